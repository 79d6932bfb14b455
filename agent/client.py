"""The commands' side of the admin socket: one question and its answer, and a migration that Ctrl-C cancels."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import uvloop

from agent.admin import Tell, admin_address, ask
from agent.output import say
from postcopy.errors import PostcopyError


def ask_now(admin: str, command: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ask the agent at `admin` and return its answer."""
    return uvloop.run(ask(admin_address(admin), command, arguments))


async def run_migrate(admin: str, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Have the source at `admin` migrate and return the report. The first Ctrl-C cancels, the second walks away."""
    address = admin_address(admin)
    running = asyncio.create_task(ask(address, "migrate", arguments, tell))
    interrupted = 0

    async def cancel() -> None:
        try:
            await ask(address, "cancel")
        except PostcopyError as error:
            say(f"{error}; still waiting for the last page, Ctrl-C again to wait no longer")

    asked: set[asyncio.Task[None]] = set()

    def interrupt() -> None:
        nonlocal interrupted
        interrupted += 1
        if interrupted > 1:
            running.cancel()
        else:
            asked.add(asyncio.create_task(cancel()))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        return await running
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
