"""Signals that end a command: Ctrl-C, SIGTERM, the end of its terminal. Work enters; a result or Interrupted leaves."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

from postcopy.errors import PostcopyError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

T = TypeVar("T")


class Interrupted(PostcopyError):  # noqa: N818 - an outcome
    """A command was ended by a signal; its exit status is 128 + the signal's number, as shells have it."""

    def __init__(self, number: int, text: str = "") -> None:
        words = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        super().__init__(f"{words}: {text}" if text else words)
        self.exit_status = 128 + number


class Signals:
    """The signals that this process gets from now on, one after the other. One that is ignored (nohup) stays so."""

    def __init__(self) -> None:
        self._came: asyncio.Queue[int] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        for number in self._taken:
            self._loop.add_signal_handler(number, self._came.put_nowait, number)

    async def next(self) -> int:
        """Wait for the next one; return its number."""
        return await self._came.get()

    def leave(self) -> None:
        """Take no more of them: the next one ends this process at once."""
        for number in self._taken:
            self._loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)


async def unless_interrupted(work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns. The first signal cancels it and waits until it has cleaned up: Interrupted."""
    signals = Signals()
    running, signalled = asyncio.create_task(work), asyncio.create_task(signals.next())
    try:
        await asyncio.wait({running, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        signals.leave()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        raise Interrupted(signalled.result())
    finally:
        signalled.cancel()
