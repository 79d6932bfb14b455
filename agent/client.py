"""The commands' side of the admin socket: one question and its answer, and a migration that a signal leaves."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import uvloop

from agent.admin import Tell, admin_address, ask
from agent.interrupt import Interrupted, Signals
from postcopy.errors import MigrationPaused, PostcopyError
from postcopy.limits import CANCEL_SECONDS
from postcopy.link.address import UnixAddress
from postcopy.session.states import SWITCHED


def ask_now(admin: str, command: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ask the agent at `admin` and return its answer."""
    return uvloop.run(ask(admin_address(admin), command, arguments))


async def run_migrate(admin: str, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Have the source at `admin` migrate and return the report.

    A signal ends this command at once: before the switchover the migration is cancelled, after it nobody can do that,
    and it goes on by itself: Interrupted. One that somebody pauses is not waited for: MigrationPaused.
    """
    address = admin_address(admin)
    switched_over, held = asyncio.Event(), asyncio.Event()

    def follow(now: dict[str, Any]) -> None:
        if now["state"] in SWITCHED:
            switched_over.set()
        if now.get("held"):
            held.set()
        tell(now)

    signals = Signals()
    running = asyncio.create_task(ask(address, "migrate", arguments, follow))
    signalled = asyncio.create_task(signals.next())
    paused = asyncio.create_task(held.wait())
    await asyncio.wait({running, signalled, paused}, return_when=asyncio.FIRST_COMPLETED)
    if paused.done() and not running.done():
        raise MigrationPaused(f"paused by hand: postcopy resume --admin {address} lets it go on")
    if not running.done():
        again = asyncio.create_task(signals.next())
        leaving = asyncio.create_task(_cancel(address, running, switched_over))
        await asyncio.wait({leaving, again}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        return running.result()
    if not switched_over.is_set():
        raise Interrupted(signalled.result(), "the agent did not cancel the migration in time: ask it for its status")
    interrupted = Interrupted(
        signalled.result(), "the guest runs at the destination, and the migration goes on without this command"
    )
    interrupted.owner = "destination"
    raise interrupted


async def _cancel(address: UnixAddress, running: asyncio.Task[dict[str, Any]], switched_over: asyncio.Event) -> None:
    """Return when the migration is cancelled, or has switched over before it could be, or nobody answers."""
    crossing = asyncio.create_task(switched_over.wait())
    with contextlib.suppress(PostcopyError, TimeoutError):
        async with asyncio.timeout(CANCEL_SECONDS):
            await ask(address, "cancel")
            await asyncio.wait({running, crossing}, return_when=asyncio.FIRST_COMPLETED)
