"""Extents: runs of bytes within one region, put together and cut apart.

What enters: extents in any order. What leaves: the same bytes in as few, or as small, extents as asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Extent(NamedTuple):
    """`length` bytes from `offset` of region number `region`."""

    region: int
    offset: int
    length: int

    @property
    def stop(self) -> int:
        """Offset of the first byte after it."""
        return self.offset + self.length


def coalesce(extents: Iterable[Extent]) -> list[Extent]:
    """Return the union of `extents`, ascending; touching and overlapping ones become one, empty ones go."""
    joined: list[Extent] = []
    for extent in sorted(extents):
        if extent.length < 0 or extent.offset < 0:
            raise ValueError(f"{extent} has a negative part")
        if extent.length == 0:
            continue
        last = joined[-1] if joined else None
        if last is not None and last.region == extent.region and extent.offset <= last.stop:
            joined[-1] = Extent(last.region, last.offset, max(last.stop, extent.stop) - last.offset)
        else:
            joined.append(extent)
    return joined


def split(extent: Extent, length_max: int) -> Iterator[Extent]:
    """Cut `extent` into pieces of `length_max` bytes, the last one maybe shorter.

    Page alignment is the caller's: a `length_max` that is a multiple of the page size keeps it.
    """
    if length_max < 1:
        raise ValueError(f"pieces of {length_max} bytes")
    for offset in range(extent.offset, extent.stop, length_max):
        yield Extent(extent.region, offset, min(length_max, extent.stop - offset))
