"""Daemons as child processes of a command: started, waited for until they are ready, and always reaped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from postcopy.errors import PostcopyError
from postcopy.limits import CHILD_END_SECONDS, CHILD_READY_SECONDS

# What is configured is meant for this host's own daemons.
ALONE = ("--config", os.devnull, "--log-format", "text")


class ChildError(PostcopyError):
    """A daemon ended although it should not have; brings its exit status along where it says something."""

    def __init__(self, text: str, exit_status: int) -> None:
        super().__init__(text)
        self.exit_status = exit_status


class Daemon:
    """One daemon: `name` is its command, `arguments` follow. Its log goes to `log`. Leaving the block ends it.

    `prefix` is a command that runs it somewhere else, in its own process (`ip netns exec NAME`, `taskset -c 0`).
    It holds one end of a pipe of which this process alone holds the other: however this process ends, even by SIGKILL,
    the daemon sees it and ends, too. Then nobody else is left to remove `scratch`, a folder, so the daemon does.
    """

    def __init__(
        self, name: str, arguments: list[str], log: Path, prefix: tuple[str, ...] = (), scratch: Path | None = None
    ) -> None:
        self.name = name
        self._prefix = prefix
        self._arguments = [*arguments, *(["--scratch", str(scratch)] if scratch is not None else [])]
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._alive_fd = -1

    async def __aenter__(self) -> Self:
        """Start it and wait until it says that it is ready; ChildError with its last words if it ends before."""
        read_fd, ready_fd = os.pipe()
        try:
            try:
                await self._start(ready_fd)
            finally:
                os.close(ready_fd)
            await self._ready(read_fd)
        except BaseException:
            await self.end()
            raise
        finally:
            os.close(read_fd)
        return self

    async def _start(self, ready_fd: int) -> None:
        end_fd, self._alive_fd = os.pipe()
        try:
            with self._log.open("wb") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._prefix,
                    *(sys.executable, "-m", "agent", *ALONE, self.name, *self._arguments),
                    *("--ready-fd", str(ready_fd), "--end-with-fd", str(end_fd)),
                    env={name: value for name, value in os.environ.items() if not name.startswith("POSTCOPY_")},
                    pass_fds=[ready_fd, end_fd],
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the command; it ends its children in its own order
                )
        finally:
            os.close(end_fd)

    async def _ready(self, read_fd: int) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(read_fd, readable.set)
        try:
            async with asyncio.timeout(CHILD_READY_SECONDS):
                await readable.wait()
        except TimeoutError:
            raise ChildError(f"the {self.name} was not ready within {CHILD_READY_SECONDS:g} s", 1) from None
        finally:
            loop.remove_reader(read_fd)
        if not os.read(read_fd, 4096):
            status = await self.wait()
            raise ChildError(self.last_words() or f"the {self.name} ended with status {status}", status or 1)

    async def wait(self) -> int:
        """Wait for its end; return its exit status, 128 + n for signal n."""
        assert self._process is not None  # noqa: S101 - only called once it was started
        status = await self._process.wait()
        return status if status >= 0 else 128 - status

    def last_words(self) -> str:
        """Return the last line of its log, without when it was and who said it."""
        with contextlib.suppress(OSError):
            lines = self._log.read_text(errors="replace").splitlines()
            said = re.sub(r"^[\d:.]{12} ", "", lines[-1]) if lines else ""
            return said.removeprefix("postcopy: ").removeprefix(f"{self.name}: ")
        return ""

    def lines_with(self, words: str) -> list[str]:
        """Return the lines of its log that hold these words, without when they were said and by whom."""
        with contextlib.suppress(OSError):
            lines = self._log.read_text(errors="replace").splitlines()
            return [re.sub(rf"^[\d:.]{{12}} ({self.name}: )?", "", line) for line in lines if words in line]
        return []

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.end()

    async def end(self) -> None:
        """Ask it to end, then make it; never leave it behind."""
        if self._process is not None and self._process.returncode is None:
            await self._end(self._process)
        if self._alive_fd >= 0:
            fd, self._alive_fd = self._alive_fd, -1
            os.close(fd)

    @staticmethod
    async def _end(process: asyncio.subprocess.Process) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            try:
                await asyncio.wait_for(asyncio.shield(process.wait()), CHILD_END_SECONDS)
            except TimeoutError:
                continue
            return
