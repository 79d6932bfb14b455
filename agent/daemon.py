"""What both daemons share: signals, telling that they are ready, metrics, and their end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import signal
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import uvloop

from agent import logs, notify
from agent.security import privileges
from postcopy.errors import UsageError
from postcopy.link.about import About, speak_of
from postcopy.link.address import UnixAddress

log = logging.getLogger("postcopy.agent")

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True)
class Parent:
    """The command that started a daemon for itself: the end of `end_fd` is its own, `scratch` is its folder."""

    end_fd: int | None = None
    scratch: Path | None = None


class Stop:
    """SIGTERM and SIGINT, counted: `asked` is set by the first, `again` by the second.

    A terminal that goes away may say so more than once, so SIGHUP only asks. Nobody can ask on behalf of a parent
    that is gone: its end counts as both.
    """

    def __init__(self, parent: Parent) -> None:
        self.asked = asyncio.Event()
        self.again = asyncio.Event()
        self._parent = parent
        self._loop = asyncio.get_running_loop()
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._take)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup(1) leaves it
            self._loop.add_signal_handler(signal.SIGHUP, self.asked.set)
        if parent.end_fd is not None:
            self._loop.add_reader(parent.end_fd, self._orphaned, parent.end_fd)

    def _take(self) -> None:
        (self.again if self.asked.is_set() else self.asked).set()

    def _orphaned(self, end_fd: int) -> None:
        self._loop.remove_reader(end_fd)
        if self._parent.scratch is not None:
            shutil.rmtree(self._parent.scratch, ignore_errors=True)
        self.asked.set()
        self.again.set()


def tell_ready(ready_fd: int | None, address: str = "") -> None:
    """Write READY=1, and the address where there is one, to `ready_fd` and to systemd's socket (sd_notify(3))."""
    lines = "READY=1\n" + (f"STATUS=listening on {address}\nX_ADDRESS={address}\n" if address else "")
    if ready_fd is not None:
        try:
            os.write(ready_fd, lines.encode())
            os.close(ready_fd)
        except OSError as error:
            raise UsageError(f"--ready-fd {ready_fd}: {error.strerror}") from error
    notify.tell(lines)


def run(role: str, daemon: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a daemon, with no more rights than it needs, and end the process with the status it returns."""
    privileges.drop()
    speak_of(About(role))
    gc.freeze()  # what is loaded by now stays, so no collection in the middle of a switchover looks at all of it
    raise SystemExit(uvloop.run(daemon))


def end_without_cleaning(status: int, admin: UnixAddress | None) -> NoReturn:
    """End at once. The userfaultfd stays open up to the last thread: no guest thread ever wakes to zeros."""
    if admin is not None:
        Path(admin.path).unlink(missing_ok=True)
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
