"""Rounds: what an agent does again and again, and urgently to nobody, it does all at the same moments.

Whoever waits for a round enters, and goes on together with all others that wait for it. Where CPUs are scarce each
wake-up of the event loop takes one from a fault: looking, telling and answering cost it once then, and not one by one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

# So often a terminal is drawn anew, and whoever asks for metrics again and again is answered.
ROUND_SECONDS = 0.1
# As much sooner than asked for is as good: who goes on at a round asks for the next one a moment later.
SOONER_SECONDS = 0.1 * ROUND_SECONDS


@dataclass(slots=True)
class _Round:
    """One round to come: its timer, and who waits for it."""

    timer: asyncio.TimerHandle
    waiting: list[asyncio.Future[None]] = field(default_factory=list)


class _Rounds:
    """The rounds of one event loop, by number. They begin when one is first waited for: agents of a host take turns."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._origin = loop.time()
        self._latest = 0
        self._coming: dict[int, _Round] = {}  # none that nobody waits for: it would wake the loop, and keep it alive

    async def wait(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Wait for the first round that is so far away, or a little less."""
        past = loop.time() - self._origin
        number = max(self._latest, int((past + seconds - SOONER_SECONDS) / ROUND_SECONDS)) + 1
        if number not in self._coming:
            self._coming[number] = _Round(loop.call_later(number * ROUND_SECONDS - past, self._begin, number))
        begun = loop.create_future()
        self._coming[number].waiting.append(begun)
        try:
            await begun
        finally:
            if number in self._coming:
                self._leave(number, begun)

    def _begin(self, number: int) -> None:
        self._latest = number
        for begun in self._coming.pop(number).waiting:
            if not begun.done():
                begun.set_result(None)

    def _leave(self, number: int, begun: asyncio.Future[None]) -> None:
        """Wait no longer for a round that has not begun."""
        left = self._coming[number]
        left.waiting.remove(begun)
        if not left.waiting:
            left.timer.cancel()
            del self._coming[number]


_ROUNDS: WeakKeyDictionary[asyncio.AbstractEventLoop, _Rounds] = WeakKeyDictionary()


async def next_round(seconds: float = ROUND_SECONDS) -> None:
    """Wait for the first round that is `seconds` away, or a little less; less than a round as long as that is."""
    if seconds < ROUND_SECONDS:
        await asyncio.sleep(seconds)
        return
    loop = asyncio.get_running_loop()
    if loop not in _ROUNDS:
        _ROUNDS[loop] = _Rounds(loop)
    await _ROUNDS[loop].wait(loop, seconds)
