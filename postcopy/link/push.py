"""The source's push: what the plan decides becomes orders for the pump, never more of them than it has room for.

Mappings of a stopped guest enter (their holes are stable then), extents leave for the pump's ring, at most `rate`
bytes a second of them. It looks at the memory's file in a thread and never at the memory itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence

from postcopy.kernel import Mapping
from postcopy.pages.regions import Layout
from postcopy.plan.push import PushExtent, PushPlan
from postcopy.pump.source import RING_EXTENTS, SourcePump

# With a rate, as much as it allows in this time is ordered at once, and never more.
BURST_SECONDS = 0.05
# How often is looked whether the pump has sent what it was given.
LOOK_SECONDS = 0.002


class Push:
    """Feeds one pump until everything is ordered. `rate` (bytes a second, None: no limit) may be set at any time."""

    def __init__(self, layout: Layout, mappings: Sequence[Mapping], pump: SourcePump, rate: int | None) -> None:
        self.rate = rate
        self._plan = PushPlan(layout)
        self._mappings = mappings
        self._pump = pump
        self._room = asyncio.Event()
        self._budget = 0.0  # bytes that may be sent now; below zero: more than allowed was
        self._paced_at = time.monotonic()
        self._paced_sent = 0

    async def run(self) -> None:
        """Find out what there is to push, order all of it, say that it was all."""
        loop = asyncio.get_running_loop()
        low_fd = self._pump.low_fd
        loop.add_reader(low_fd, self._ran_low, low_fd)
        try:
            for mapping in self._mappings:
                await asyncio.to_thread(survey, self._plan, mapping)
            while not self._plan.done:
                await self._order(RING_EXTENTS)
            self._pump.push_end()
        finally:
            loop.remove_reader(low_fd)

    def _ran_low(self, low_fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(low_fd, 8)
        self._room.set()

    async def _order(self, room: int) -> None:
        """Give the pump its next extents and wait until it wants more."""
        rate = self.rate
        if rate is None:
            await self._hand_over(self._plan.next(room))
            return
        # What was sent is counted, not what was ordered: pages that were asked for meanwhile are not sent again.
        while self._settle(rate) <= 0:
            await asyncio.sleep(min(BURST_SECONDS, LOOK_SECONDS - self._budget / rate))
        left = self._budget
        while left > 0 and not self._plan.done:
            extents = self._plan.next(1)
            left -= sum(extent.length for extent in extents if not extent.zero)
            await self._hand_over(extents)
        while self._pump.snapshot().queued:
            await asyncio.sleep(LOOK_SECONDS)

    def _settle(self, rate: int) -> float:
        """Credit the time that has passed, charge the bytes that were sent; return what may be sent now."""
        now, sent = time.monotonic(), self._pump.snapshot().bytes_sent_push
        credit = self._budget + rate * (now - self._paced_at) - (sent - self._paced_sent)
        self._budget = min(credit, rate * BURST_SECONDS)
        self._paced_at, self._paced_sent = now, sent
        return self._budget

    async def _hand_over(self, extents: list[PushExtent]) -> None:
        while extents:
            self._room.clear()
            accepted = self._pump.push(extents)
            extents = extents[accepted:]
            if extents:
                await self._room.wait()


def survey(plan: PushPlan, mapping: Mapping) -> None:
    """Tell the plan where one region holds data and where it has holes."""
    index, stop = mapping.region.index, 0
    for offset, length in mapping.data_extents():
        if offset > stop:
            plan.hole(index, stop, offset - stop)
        plan.data(index, offset, length)
        stop = offset + length
    if stop < mapping.region.size:
        plan.hole(index, stop, mapping.region.size - stop)
