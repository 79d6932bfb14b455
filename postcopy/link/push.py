"""The source's push: what the plan decides becomes orders for the pump, never more of them than it has room for.

Mappings of a stopped guest enter (their holes are stable then), extents leave for the pump's ring, at most `rate`
bytes a second of them. It looks at the memory's file in a thread and never at the memory itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from postcopy.pages.regions import Layout, Region
from postcopy.plan.push import EXTENT_BYTES, PushExtent, PushPlan
from postcopy.pump.source import RING_EXTENTS, SourcePump

# With a rate, as much as it allows in this time is ordered at once, and never more.
BURST_SECONDS = 0.05
# Without one, so many extents are taken from the plan at once: the pump's ring has room for some of these.
AHEAD_EXTENTS = RING_EXTENTS // 4
# How often is looked whether the pump has sent what it was given.
LOOK_SECONDS = 0.002


class Surveyed(Protocol):
    """What the push needs of a region's memory; postcopy.kernel has some."""

    @property
    def region(self) -> Region:
        """The region."""

    def data_extents(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what may hold data, ascending, in whole pages."""


class Pace:
    """How many bytes a second the push may send. `rate` may be set at any time; 0 and None: no limit."""

    def __init__(self, rate: int | None) -> None:
        self._rate = rate or None
        self._budget = 0.0  # bytes that may be sent now; below zero: more than allowed was
        self._settled_at = 0.0
        self._settled_sent = 0
        self._fresh = True

    @property
    def rate(self) -> int | None:
        """Bytes a second, None: no limit. A new rate begins without the debt and the credit of the old one."""
        return self._rate

    @rate.setter
    def rate(self, rate: int | None) -> None:
        if (rate or None) != self._rate:
            self._rate = rate or None
            self._fresh = True

    def restart(self) -> None:
        """Begin anew: what was sent is counted from nothing again."""
        self._fresh = True

    def allowance(self, now: float, sent: int) -> tuple[float, float]:
        """Credit the time since the last look, charge what was sent; return (bytes allowed now, seconds to wait).

        What was sent is counted, not what was ordered: pages that were asked for meanwhile are not sent again.
        """
        if self._rate is None:
            return math.inf, 0.0
        if self._fresh:
            self._budget, self._settled_at, self._settled_sent, self._fresh = 0.0, now, sent, False
        credit = self._budget + self._rate * (now - self._settled_at) - (sent - self._settled_sent)
        self._budget = min(credit, self._rate * BURST_SECONDS)
        self._settled_at, self._settled_sent = now, sent
        # Never a long sleep: the rate may be another one soon.
        return self._budget, min(BURST_SECONDS, LOOK_SECONDS - min(self._budget, 0.0) / self._rate)


class Push:
    """Feeds one pump until everything is ordered, at the pace that is set."""

    def __init__(self, layout: Layout, mappings: Sequence[Surveyed], pump: SourcePump, pace: Pace) -> None:
        self._plan = PushPlan(layout)
        self._mappings = mappings
        self._pump = pump
        self._pace = pace
        self._room = asyncio.Event()
        self._ending = threading.Event()

    async def run(self) -> None:
        """Find out what there is to push, order all of it, say that it was all."""
        loop = asyncio.get_running_loop()
        low_fd = self._pump.low_fd
        loop.add_reader(low_fd, self._ran_low, low_fd)
        try:
            for mapping in self._mappings:
                await self._survey(mapping)
            while not self._plan.done:
                await self._order()
            self._pump.push_end()
        finally:
            loop.remove_reader(low_fd)

    async def _survey(self, mapping: Surveyed) -> None:
        """Look at one region in a thread; whoever cancels this may close the region's file when it has returned."""
        looking = asyncio.create_task(asyncio.to_thread(survey, self._plan, mapping, self._ending))
        try:
            await asyncio.shield(looking)
        except asyncio.CancelledError:
            self._ending.set()
            await asyncio.wait({looking})
            raise

    def _ran_low(self, low_fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(low_fd, 8)
        self._room.set()

    async def _order(self) -> None:
        """Give the pump its next extents; with a rate, once it may send some, and wait until it has sent them."""
        if holes := self._plan.holes(RING_EXTENTS):  # no payload follows them: no rate holds them back
            await self._hand_over(holes)
            return
        if (demand := self._pump.demanded()) is not None:
            self._plan.demanded(*demand)
        if self._pace.rate is None:
            self._plan.cut(EXTENT_BYTES)
            await self._hand_over(self._plan.next(AHEAD_EXTENTS))
            return
        self._plan.cut(min(EXTENT_BYTES, max(1, int(self._pace.rate * BURST_SECONDS))))
        allowed, pause = self._pace.allowance(time.monotonic(), self._pump.snapshot().bytes_sent_push)
        if allowed <= 0:
            await asyncio.sleep(pause)
            return
        while allowed > 0 and (extents := self._plan.next(1)):
            allowed -= sum(extent.length for extent in extents)
            await self._hand_over(extents)
        while self._pump.snapshot().queued:
            await asyncio.sleep(LOOK_SECONDS)

    async def _hand_over(self, extents: list[PushExtent]) -> None:
        while extents:
            self._room.clear()
            accepted = self._pump.push(extents)
            extents = extents[accepted:]
            if extents:
                await self._room.wait()


def survey(plan: PushPlan, mapping: Surveyed, ending: threading.Event) -> None:
    """Tell the plan where one region holds data and where it has holes; leave it at that once `ending` is set."""
    index, stop = mapping.region.index, 0
    for offset, length in mapping.data_extents():
        if ending.is_set():
            return
        if offset > stop:
            plan.hole(index, stop, offset - stop)
        plan.data(index, offset, length)
        stop = offset + length
    if stop < mapping.region.size:
        plan.hole(index, stop, mapping.region.size - stop)
