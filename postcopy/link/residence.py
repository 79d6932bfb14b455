"""What a destination has of a guest's memory, on its way to the source and there.

A destination's detached pump enters, Have messages leave, or the pages that are lost; at the source the messages enter,
and a pump that need not send these pages leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from postcopy.errors import ProtocolError
from postcopy.limits import HAVE_PAGES_MAX
from postcopy.pages.bitmap import Bitmap
from postcopy.pages.ledger import PageState
from postcopy.pages.regions import Layout
from postcopy.pump.destination import DestinationPump
from postcopy.pump.source import SourcePump
from postcopy.wire import residence
from postcopy.wire.control import Have


class Extent(NamedTuple):
    """Bytes of a region, whole pages."""

    region: int
    offset: int
    length: int


def what_is_here(layout: Layout, pump: DestinationPump) -> list[Have]:
    """Return what a detached pump has, all regions; takes some milliseconds for millions of pages, in a thread."""
    haves: list[Have] = []
    for region in layout.regions:
        haves += residence.tell(region.index, region.pages, _pieces(pump.page_map(region.index)))
    return haves


def _pieces(states: memoryview) -> Iterator[Bitmap]:
    for first in range(0, len(states), HAVE_PAGES_MAX):
        yield Bitmap.of_states(states[first : first + HAVE_PAGES_MAX], PageState.PLACED, PageState.ZERO)


def extents_of(layout: Layout, pump: DestinationPump, *states: PageState) -> list[Extent]:
    """Return the runs of pages in these states, in order."""
    return [
        Extent(region.index, first * region.page_size, (stop - first) * region.page_size)
        for region in layout.regions
        for first, stop in Bitmap.of_states(pump.page_map(region.index), *states).runs()
    ]


class Residence:
    """What the destination said that it has; nothing at first."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._room = layout.pages
        self._found: list[tuple[int, int, Bitmap]] = []

    def add(self, have: Have) -> None:
        """Take note of a message; ProtocolError where it is none about this memory."""
        known = have.region < len(self._layout.regions)
        if not known or have.first + have.pages > self._layout.region(have.region).pages:
            raise ProtocolError(f"message have: region {have.region} has no {have.pages} pages from {have.first} on")
        self._room -= have.pages
        if self._room < 0:  # nobody may fill this side's memory by saying it again and again
            raise ProtocolError("message have: more pages than the memory has")
        self._found.append((have.region, have.first, residence.read(have)))

    def skip_in(self, pump: SourcePump) -> None:
        """Have a pump not push what is there."""
        for region, first, has in self._found:
            pump.skip(region, first, has)
