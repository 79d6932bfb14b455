"""What a destination can tell of a migration: counters, how long what took, and the report that is made of them.

The pump, the memory and the guest enter as the interpreter comes by them; figures leave, for whoever watches, and the
report, for the source and for people.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from postcopy.limits import SETTLED_SECONDS
from postcopy.link.course import Course
from postcopy.link.guest import MigratingGuest
from postcopy.link.latencies import latencies
from postcopy.link.prepare import Memory
from postcopy.link.pumping import PumpInterpreter
from postcopy.link.report import Report, arrived
from postcopy.pump.destination import DestinationPump, DestinationStats
from postcopy.pump.histogram import Histogram
from postcopy.session.destination import DestinationMachine
from postcopy.session.events import AllResident
from postcopy.wire.latencies import NOTHING

# Far longer than it takes to note a fault's time, where a CPU is to be had.
SETTLED_LOOK_SECONDS = 0.001


class DestinationFigures(PumpInterpreter[DestinationPump, DestinationStats]):
    """The part of a destination's interpreter that counts and sums up. Times are CLOCK_MONOTONIC in seconds."""

    machine: DestinationMachine

    def __init__(self, machine: DestinationMachine, mode: str, name: str) -> None:
        super().__init__("destination", machine, name)
        self.mode = mode
        self.memory: Memory | None = None
        self.guest: MigratingGuest | None = None
        self.report: Report | None = None
        self.latencies = NOTHING  # of the faults that the report sums up
        self.stopped_at = 0.0
        self.run_at = 0.0
        self.resident_at = 0.0
        self._left: MigratingGuest | None = None  # which was the guest here
        self._course = Course()
        self._traps_for_ever = False
        self._told: DestinationStats | None = None  # the counters of the report, where no later ones count

    async def _sum_up(self) -> None:
        """Make the report, once, and post it."""
        stats = await self._settled()
        if self.report is None and self.memory is not None and self.guest is not None and stats is not None:
            course = self._course.columns(stats.pages_total)
            whole = (self.mode, self.memory.layout, stats, self.guest, self.timing())
            self.latencies = latencies(stats.fault_latency, self.guest)
            self.report = arrived(*whole, course=course, tls=self.encrypted, left=self.left(stats))
            if not self.serves_on:  # heartbeats and duplicates come until its end; nobody waits for a page any more
                self._told = replace(stats, pending=0)
            self.post(AllResident(self.now(), self.report, self.latencies))

    async def _settled(self) -> DestinationStats | None:
        """Return the counters of a moment without a fault that is counted and has no latency yet.

        The last page is here before the pump has noted how long it took; who serves on is not waited for.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLED_SECONDS):
                while (stats := self.snapshot()) is not None and stats.unsettled and not self.serves_on:
                    await asyncio.sleep(SETTLED_LOOK_SECONDS)
        return stats

    @property
    def serves_on(self) -> bool:
        """Whether the pump has work when every page is here."""
        return self._traps_for_ever or (self.memory is not None and self.memory.resident)

    def left(self, _stats: DestinationStats) -> int:
        """Return how many pages never came, and are not missed by anybody."""
        return 0

    def timing(self) -> dict[str, float]:
        """Return what this side's clock says: downtime where both ends share a clock, time to full residency."""
        first = self.guest.first_step_at if self.guest is not None else None
        comparable = first is not None and self.machine.comparable
        return {
            "downtime_seconds": first - self.stopped_at if comparable and first is not None else 0.0,
            # the last page of a small guest may be here before Run is
            "resident_seconds": max(0.0, self.resident_at - self.run_at),
        }

    def snapshot(self) -> DestinationStats | None:
        """Return the pump's counters; those of memory that was handed over, where it needs no pump.

        Once there is a report they are what it says, unless the pump serves on.
        """
        stats = self._told or super().snapshot()
        if stats is None and self.memory is not None and self.memory.resident:
            stats = DestinationStats.of_handed_over(self.memory.layout)
        return stats

    def progress(self) -> tuple[int, int] | None:
        """Return pages resident and faults that wait for their page, as snapshot() would."""
        if self._told is None and self._pump is not None:
            return self._pump.progress()
        stats = self.snapshot()
        return None if stats is None else (stats.pages_resident, stats.pending)

    @property
    def stall(self) -> Histogram | None:
        """What the guest's own clock told here, also once it has left; None before there was one."""
        guest = self.guest or self._left
        return None if guest is None else guest.stall

    def residency(self, cells: int) -> list[float]:
        """Return which part of each of `cells` pieces of memory is resident; [] before there is any."""
        if self._pump is not None:
            return self._pump.residency(cells)
        stats = self.snapshot()
        return [stats.pages_resident / stats.pages_total] * cells if stats is not None else []
