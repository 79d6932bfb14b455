"""What the daemons do for `postcopy pause`, `resume` and `cancel --lost`, and these commands as click sees them.

A source or a destination enters, its state once something has come of the wish leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import click

from agent.parameters import ADDRESS, admin_option, json_option
from agent.security.options import credentials, insecure_option
from postcopy.errors import HostError, MigrationLost, MigrationPaused
from postcopy.limits import DONE_SECONDS, RESUME_SECONDS
from postcopy.link.address import Address, parse_address
from postcopy.session.states import State

LOOK_SECONDS = 0.02


class Side(Protocol):
    """A Source or a Destination."""

    @property
    def state(self) -> State:
        """Where the latest migration stands."""

    @property
    def pause_state(self) -> dict[str, Any] | None:
        """Why it is paused."""


class Dialling(Side, Protocol):
    """A side that dials: a Source, or a destination that fetches."""

    @property
    def encrypted(self) -> bool:
        """Whether its connections are."""

    async def handled(self) -> None:
        """Return when it knows what was wished for."""


def another_address(source: Dialling, arguments: dict[str, Any]) -> Address | None:
    """Return where `resume --to` has the destination; UsageError where it would be reached in plain unasked."""
    if "to" not in arguments:
        return None
    address = parse_address(str(arguments["to"]))
    if not source.encrypted:
        credentials(address, None, insecure=bool(arguments.get("insecure")))
    return address


async def _until(done: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(DONE_SECONDS):
            while not done():
                await asyncio.sleep(LOOK_SECONDS)
    except TimeoutError:
        raise HostError(f"not {what} within {DONE_SECONDS:g} s: see `status`, it may be so yet") from None


async def paused(side: Side) -> dict[str, Any]:
    """Wait until the migration is paused, or has ended meanwhile."""
    await _until(lambda: side.state is not State.POSTCOPY_ACTIVE, "paused")
    return {"schema_version": 1, "state": side.state.value, "paused": side.pause_state}


async def resumed(source: Dialling) -> dict[str, Any]:
    """Wait until pages travel again; MigrationPaused where an attempt failed, the next one following by itself."""
    await source.handled()  # up to there it tells of attempts before this one
    try:
        async with asyncio.timeout(RESUME_SECONDS):
            while (now := source.pause_state) is not None and not now["attempts"]:
                await asyncio.sleep(LOOK_SECONDS)
    except TimeoutError:
        now = source.pause_state
    if now is not None:
        raise MigrationPaused(f"paused still: {now['text']}; it is tried again and again")
    if source.state is State.LOST:
        raise MigrationLost("the migration is lost")
    return {"schema_version": 1, "state": source.state.value, "paused": None}


async def lost(side: Side) -> dict[str, Any]:
    """Wait until the migration is given up."""
    await _until(lambda: side.state is State.LOST, "given up")
    report = getattr(side, "report", None)
    pages = report["pages"].get("lost") if isinstance(report, dict) else None
    return {"schema_version": 1, "state": side.state.value, "lost_pages": pages}


@click.command()
@admin_option
@json_option
def pause(admin: str, as_json: bool) -> None:
    """Close a migration's connections, until `resume`.

    After its switchover only. The guest runs on with what it has, and waits where it touches anything else.
    """
    from agent.client import ask_now  # noqa: PLC0415 - as in commands.py
    from agent.output import print_json, print_rows  # noqa: PLC0415

    found = ask_now(admin, "pause")
    if as_json:
        print_json(found)
    else:
        print_rows([("state", found["state"])])


@click.command()
@admin_option
@click.option(
    "--to", type=ADDRESS, metavar="tcp:HOST:PORT", help="Where the destination, or the source of --from, is now."
)
@insecure_option
@json_option
def resume(admin: str, to: Address | None, insecure: bool, as_json: bool) -> None:
    """Have a paused migration go on, at once.

    Ends with 5 where that did not work; it is tried on.
    """
    from agent.client import ask_now  # noqa: PLC0415
    from agent.output import print_json, print_rows  # noqa: PLC0415

    found = ask_now(admin, "resume", {"to": str(to), "insecure": insecure} if to is not None else {})
    if as_json:
        print_json(found)
    else:
        print_rows([("state", found["state"])])


@click.command()
@admin_option
@click.option("--lost", is_flag=True, help="Give up a migration that is paused: what did not arrive is lost.")
@json_option
def cancel(admin: str, lost: bool, as_json: bool) -> None:
    """Cancel a migration before its switchover.

    The source runs the guest on. After the switchover nothing is cancelled: --lost gives up one that is paused.
    """
    from agent.client import ask_now  # noqa: PLC0415
    from agent.output import print_json, print_rows  # noqa: PLC0415

    found = ask_now(admin, "cancel", {"lost": lost})
    if as_json:
        print_json(found)
    elif lost:
        pages = found["lost_pages"]
        print_rows([("migration", "given up" if pages is None else f"given up: {pages} pages are lost")])
    else:
        print_rows([("migration", "asked to cancel")])
