"""From a region's mapping in this process to the C pump's description of it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Protocol

from postcopy.pages.regions import Layout, Region
from postcopy.pump._pump import ffi, lib


class Placement(IntEnum):
    """How the content of a page becomes a present page."""

    COPY = lib.PLACE_COPY
    CONTINUE = lib.PLACE_CONTINUE
    MOVE = lib.PLACE_MOVE


class Removal(IntEnum):
    """What it means where the kernel tells that the guest gave pages back by madvise(2), which are not here yet.

    UNTOLD: it is not told (Feature.EVENT_REMOVE is off). KEEPS: they are fetched all the same. DISCARDS: they are
    zeros from then on.
    """

    UNTOLD = lib.REMOVAL_UNTOLD
    KEEPS = lib.REMOVAL_KEEPS
    DISCARDS = lib.REMOVAL_DISCARDS


class MappedRegion(Protocol):
    """What a pump needs of a mapping; postcopy.kernel's Mapping is one."""

    @property
    def region(self) -> Region:
        """The region that is mapped."""

    @property
    def address(self) -> int:
        """Address of the mapping that the guest uses; 0: none, a source reads the file."""

    @property
    def alias(self) -> int:
        """Address of a second mapping that is never registered, 0 if there is none."""

    @property
    def fd(self) -> int:
        """The file behind the memory, -1 if there is none."""

    @property
    def fd_offset(self) -> int:
        """Where in that file the region begins."""


def describe(
    layout: Layout,
    mappings: Sequence[MappedRegion],
    demand: Sequence[Placement] | None = None,
    push: Sequence[Placement] | None = None,
    zeropage: Sequence[bool] | None = None,
    *,
    removal: Sequence[Removal] | None = None,
    foreign: bool = False,
    maps: Sequence[int] | None = None,
) -> tuple[Any, int]:
    """Return the C array of regions and their number.

    `demand`, `push`, `zeropage` and `removal` have one entry for each region; a source needs none of them. `foreign`:
    the addresses are those of another process. `maps` are the addresses of page maps that are kept, if they are.
    """
    count = len(layout.regions)
    regions = ffi.new("struct pump_region[]", count)
    for index, (region, mapping) in enumerate(zip(layout.regions, mappings, strict=True)):
        entry = regions[index]
        entry.guest, entry.alias = mapping.address, mapping.alias
        entry.fd, entry.fd_offset = mapping.fd, mapping.fd_offset
        entry.size, entry.page_size = region.size, region.page_size
        entry.demand = demand[index] if demand else Placement.COPY
        entry.push = push[index] if push else Placement.COPY
        entry.zeropage = zeropage[index] if zeropage else False
        entry.removal = removal[index] if removal else Removal.UNTOLD
        entry.foreign = foreign
        entry.map = maps[index] if maps else 0
    return regions, count
