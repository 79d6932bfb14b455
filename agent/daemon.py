"""What both daemons share: signals, telling that they are ready, metrics, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Coroutine
from typing import Any, NoReturn

import uvloop

from agent import logs
from postcopy.errors import UsageError

log = logging.getLogger("postcopy.agent")

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """SIGTERM and SIGINT, counted: `asked` is set by the first, `again` by the second."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.again = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._take)

    def _take(self) -> None:
        (self.again if self.asked.is_set() else self.asked).set()


def tell_ready(ready_fd: int | None, address: str = "") -> None:
    """Write READY=1, and the address where there is one, to `ready_fd` and to systemd's socket (sd_notify(3))."""
    lines = "READY=1\n" + (f"STATUS=listening on {address}\nX_ADDRESS={address}\n" if address else "")
    if ready_fd is not None:
        try:
            os.write(ready_fd, lines.encode())
            os.close(ready_fd)
        except OSError as error:
            raise UsageError(f"--ready-fd {ready_fd}: {error.strerror}") from error
    notify = os.environ.get("NOTIFY_SOCKET")
    if notify:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect("\0" + notify[1:] if notify.startswith("@") else notify)
            connection.sendall(lines.encode())


def run(daemon: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a daemon and end the process with the status it returns."""
    raise SystemExit(uvloop.run(daemon))


def end_without_cleaning(status: int) -> NoReturn:
    """End at once. The userfaultfd stays open up to the last thread: no guest thread ever wakes to zeros."""
    logs.flush()
    os._exit(status)


async def first_of(*events: asyncio.Event) -> None:
    """Wait until one of the events is set."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
