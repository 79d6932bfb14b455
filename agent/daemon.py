"""What all daemons share: options, metrics, the admin socket, telling that they are ready, signals, and their end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import uvloop

from agent import logs, metrics, notify
from agent.admin import AdminServer, Handler, admin_address
from agent.config.origin import named
from agent.scrapes import Scrapes
from agent.security import privileges
from postcopy.errors import UsageError
from postcopy.link.about import About, speak_of
from postcopy.link.address import TcpAddress, UnixAddress

log = logging.getLogger("postcopy.agent")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TIDY_SECONDS = 0.5  # after a migration; no next one has come that far by then


@dataclass(frozen=True, slots=True)
class Parent:
    """The command that started a daemon for itself: the end of `end_fd` is its own, `scratch` is its folder."""

    end_fd: int | None = None
    scratch: Path | None = None


@dataclass(frozen=True, kw_only=True)
class DaemonOptions:
    """What the command line of every daemon says."""

    admin: UnixAddress | None
    metrics: TcpAddress | None
    ready_fd: int | None
    poll_max_ns: int
    parent: Parent
    give_up_after: float | None = None


def shared(said: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of DaemonOptions, of what click says."""
    return {
        "admin": admin_address(said["admin"]) if said["admin"] else None,
        "parent": Parent(said["end_with_fd"], said["scratch"]),
        **{name: said[name] for name in ("metrics", "ready_fd", "poll_max_ns", "give_up_after")},
    }


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


def serve_metrics(options: DaemonOptions, figures: Callable[[], metrics.Figures]) -> None:
    """Let whoever asks see the figures from now on, where that is wanted."""
    if options.metrics is not None:
        with named("metrics"):
            log.info("metrics: %s", Scrapes(metrics.Metrics(figures).text).open(options.metrics))


@asynccontextmanager
async def reachable(
    options: DaemonOptions,
    commands: dict[str, Handler],
    figures: Callable[[], metrics.Figures],
    words: str,
    address: str = "",
) -> AsyncIterator[AdminServer | None]:
    """Open the admin socket, say in `words` that all is ready, and how the daemon stands while the block runs."""
    async with AsyncExitStack() as stack:
        admin = AdminServer(options.admin, commands) if options.admin is not None else None
        if admin is not None:
            with named("admin"):
                await admin.open()
            stack.push_async_callback(admin.close)
        log.info("%s", words)
        tell_ready(options.ready_fd, address)
        stack.callback(asyncio.create_task(notify.keep_telling(figures)).cancel)
        yield admin


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


def tidy() -> None:
    """Collect soon what a migration that has ended left in circles: by itself Python does so once in very many."""
    asyncio.get_running_loop().call_later(TIDY_SECONDS, gc.collect)


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
