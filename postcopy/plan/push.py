"""The order of the push.

What enters, at any time and in any order: extents that hold data, extents that are holes, and hints that a
page was just asked for. What leaves: extents to push, each byte once. First the holes, for a hole costs one
header whatever its length and spares every fault inside it; then what lies around the most recent demands,
since a guest that touched a page is about to touch its neighbours; then the rest, lowest first.

A demanded page itself stays in the plan and is pushed in its turn: the hint may be wrong, or its answer be
lost.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from postcopy.errors import UsageError
from postcopy.limits import DEMANDS_MAX
from postcopy.pages.regions import Layout, Region
from postcopy.plan.intervals import IntervalSet

ORDERS = ("sequential",)


# How far the push follows a demand, in extents: ahead where programs mostly go, and a little back.
AHEAD_EXTENTS = 4
BACK_EXTENTS = 1

# One frame's payload: the longer, the less each byte costs (see the pump's README).
EXTENT_BYTES = 2 << 20


class PushExtent(NamedTuple):
    """`length` bytes from `offset` of region number `region` to push now: as they are, or as zeros."""

    region: int
    offset: int
    length: int
    zero: bool


class _Demand:
    """What is still to be looked at around a demanded page: [ahead, high) upwards first, then [low, back) downwards."""

    __slots__ = ("ahead", "back", "high", "low", "region")

    def __init__(self, region: Region, page: int, extent_bytes: int) -> None:
        self.region = region.index
        self.back = region.offset_of(page)
        self.ahead = self.back + region.page_size
        self.low = max(0, self.back - BACK_EXTENTS * extent_bytes)
        self.high = self.ahead + AHEAD_EXTENTS * extent_bytes


class PushPlan:
    """What is still to be pushed of the regions of `layout`, in extents of at most `extent_bytes` of data.

    Extents begin and end on page boundaries, and end on multiples of `extent_bytes` where the data goes on;
    a page that is larger than `extent_bytes` travels whole. Holes are not cut: no payload follows them.
    """

    def __init__(self, layout: Layout, order: str = "sequential", extent_bytes: int = EXTENT_BYTES) -> None:
        if order not in ORDERS:
            raise UsageError(f"unknown order of the push {order!r}: known are {', '.join(ORDERS)}")
        self._layout = layout
        self.cut(extent_bytes)
        self._found = [IntervalSet() for _ in layout.regions]
        self._data = [IntervalSet() for _ in layout.regions]
        self._holes = [IntervalSet() for _ in layout.regions]
        self._demands: deque[_Demand] = deque(maxlen=DEMANDS_MAX)

    def cut(self, extent_bytes: int) -> None:
        """Return extents of at most so many bytes from now on, or of one page; UsageError for less than a byte."""
        if extent_bytes < 1:
            raise UsageError(f"extents of {extent_bytes} bytes")
        # Extents are cut at multiples of this, for each region.
        self._steps = [max(1, extent_bytes // region.page_size) * region.page_size for region in self._layout.regions]

    def data(self, region: int, offset: int, length: int) -> None:
        """Take note of an extent that holds data; ValueError if it is not whole pages or partly known already."""
        self._find(region, offset, length)
        self._data[region].add(offset, offset + length)

    def hole(self, region: int, offset: int, length: int) -> None:
        """Take note of an extent that holds zeros only; ValueError if it is not whole pages or partly known."""
        self._find(region, offset, length)
        self._holes[region].add(offset, offset + length)

    def _find(self, region: int, offset: int, length: int) -> None:
        bounds = self._layout.region(region)
        if not bounds.aligned(offset, length) or not bounds.contains(offset, length):
            raise ValueError(f"extent {offset:#x} + {length:#x} is not whole pages of region {region}")
        self._found[region].add(offset, offset + length)

    def demanded(self, region: int, offset: int) -> None:
        """Take the hint that the page at `offset` was just asked for: the push goes on around it."""
        bounds = self._layout.region(region)
        self._demands.appendleft(_Demand(bounds, bounds.page_of(offset), self._steps[region]))

    @property
    def done(self) -> bool:
        """True while nothing that was found is left to push; more may be found later."""
        return not any(left.count for left in (*self._data, *self._holes))

    @property
    def data_bytes(self) -> int:
        """Bytes of data that are left to push."""
        return sum(left.total for left in self._data)

    @property
    def hole_bytes(self) -> int:
        """Bytes of holes that are left to push."""
        return sum(left.total for left in self._holes)

    def next(self, room: int) -> list[PushExtent]:
        """Return up to `room` extents to push now; none once everything that was found so far has been returned."""
        extents: list[PushExtent] = []
        while len(extents) < room:
            extent = self._next_hole() or self._next_around() or self._next_in_order()
            if extent is None:
                break
            extents.append(extent)
        return extents

    def holes(self, room: int) -> list[PushExtent]:
        """Return up to `room` holes to push now, for whoever treats them in another way than data."""
        extents: list[PushExtent] = []
        while len(extents) < room and (extent := self._next_hole()):
            extents.append(extent)
        return extents

    def _next_hole(self) -> PushExtent | None:
        for region, holes in enumerate(self._holes):
            if hole := holes.at_or_after(0):
                holes.remove(*hole)
                return PushExtent(region, hole.start, hole.stop - hole.start, zero=True)
        return None

    def _next_around(self) -> PushExtent | None:
        """Return data near the most recent demand that has some left; demands that have none are forgotten."""
        while self._demands:
            demand = self._demands[0]
            extent = self._next_ahead(demand) or self._next_back(demand)
            if extent is not None:
                return extent
            self._demands.popleft()
        return None

    def _next_ahead(self, demand: _Demand) -> PushExtent | None:
        data = self._data[demand.region].at_or_after(demand.ahead)
        if data is None or data.start >= demand.high:
            return None
        start = max(data.start, demand.ahead)
        demand.ahead = min(data.stop, demand.high, self._cut_after(demand.region, start))
        return self._take(demand.region, start, demand.ahead)

    def _next_back(self, demand: _Demand) -> PushExtent | None:
        data = self._data[demand.region].before(demand.back)
        if data is None or data.stop <= demand.low:
            return None
        stop = min(data.stop, demand.back)
        step = self._steps[demand.region]
        demand.back = max(data.start, demand.low, (stop - 1) // step * step)
        return self._take(demand.region, demand.back, stop)

    def _next_in_order(self) -> PushExtent | None:
        for region, left in enumerate(self._data):
            if data := left.at_or_after(0):
                return self._take(region, data.start, min(data.stop, self._cut_after(region, data.start)))
        return None

    def _cut_after(self, region: int, offset: int) -> int:
        """Return the first multiple of the extent size behind `offset`."""
        step = self._steps[region]
        return (offset // step + 1) * step

    def _take(self, region: int, start: int, stop: int) -> PushExtent:
        self._data[region].remove(start, stop)
        return PushExtent(region, start, stop - start, zero=False)
