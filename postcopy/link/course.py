"""The course of a migration, for its report: what was resident, what had come and how long faults took, over time.

Looks at the pump enter, often at first and ever more seldom; columns of equal length leave. A look copies counters and
works nothing out: it is made while the guest waits for pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from postcopy.limits import COURSE_BUCKETS_MAX, COURSE_LOOKS_MAX
from postcopy.link.rounds import ROUND_SECONDS, next_round
from postcopy.pump.destination import DestinationPump
from postcopy.pump.histogram import Histogram

FIRST_SECONDS = ROUND_SECONDS / 8
# After so many looks the time between two of them doubles: an hour is some 270 looks.
LOOKS_PER_PACE = 16


@dataclass(frozen=True, slots=True)
class Look:
    """The counters at one moment; `latency` are the words of a `struct hist`."""

    at: float
    pages_resident: int
    bytes_received: int
    latency: bytes


class Course:
    """Looks at a pump, one after the other; times are CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self._began = 0.0
        self._looks: list[Look] = []

    async def follow(self, pump: Callable[[], DestinationPump | None]) -> None:
        """Look at the pump from now on until there is none, or enough is known."""
        self._began = time.monotonic()
        pause = FIRST_SECONDS
        while len(self._looks) < COURSE_LOOKS_MAX:
            for _ in range(LOOKS_PER_PACE):
                await next_round(pause)
                if not self.look(pump()):
                    return
            pause *= 2

    def look(self, pump: DestinationPump | None) -> bool:
        """Look once; False where there is nothing to look at any more."""
        if pump is not None:
            self._looks.append(Look(time.monotonic(), *pump.glance()))
        return pump is not None

    def columns(self, pages_total: int) -> dict[str, list[float]]:
        """Return the looks as columns: `seconds` since the guest's start here, the part `resident`, what came so far.

        `p50` and `p99` are of the faults since the look before.
        """
        columns: dict[str, list[float]] = {
            name: [] for name in ("seconds", "resident", "received_bytes", "faults", "p50", "p99")
        }
        before = Histogram()
        for look in self._looks:
            latency = Histogram.from_words(memoryview(look.latency).cast("Q"))
            since = latency.since(before)
            row = (
                round(look.at - self._began, 6),
                round(look.pages_resident / pages_total, 6) if pages_total else 1.0,
                look.bytes_received,
                latency.count,
                since.quantile(0.5),
                since.quantile(0.99),
            )
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
            before = latency
        return columns


def distribution(recorded: Histogram) -> dict[str, Any]:
    """Return a histogram for a report: upper bounds in seconds, and how many values lie in each bucket below."""
    pairs = recorded.bounds()
    if len(pairs) > COURSE_BUCKETS_MAX:
        pairs = recorded.bounds(4)
    return {"upper_seconds": [upper for upper, _ in pairs], "counts": [count for _, count in pairs]}
