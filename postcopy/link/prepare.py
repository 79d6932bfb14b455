"""The destination's memory: everything about it that can fail is done here, before the source's guest is stopped.

An offer of another agent enters; allocated, registered memory with a pump's description leaves, or the one reason why
this host cannot have the guest. Runs in a thread: clearing and registering large memory takes its time.
"""

from __future__ import annotations

from collections.abc import Mapping as ReadOnly
from contextlib import ExitStack
from dataclasses import dataclass

from postcopy.errors import HostError, PostcopyError, ProtocolError, UsageError
from postcopy.kernel import MEMORY_TYPES, Feature, Ioctl, Mapping, MemoryType, Mode, Userfaultfd, memory_type
from postcopy.kernel import Way as PlacingWay
from postcopy.link.placement import Handling, handling
from postcopy.pages.regions import Layout, Region
from postcopy.pump.destination import DestinationPump
from postcopy.pump.regions import Placement
from postcopy.wire.control import LayoutOffer

_WAYS = {
    Placement.COPY: PlacingWay.COPY,
    Placement.CONTINUE: PlacingWay.CONTINUE,
    Placement.MOVE: PlacingWay.MOVE,
}

MemoryTypes = ReadOnly[str, MemoryType]


class RoomError(HostError):
    """This host has not got the memory."""

    code = "memory"


class GuestError(PostcopyError):
    """This agent cannot run such a guest."""

    code = "guest"


@dataclass(slots=True)
class Memory:
    """The guest's memory at the destination: trapped, empty, and owned by whoever holds this."""

    layout: Layout
    mappings: list[Mapping]
    uffd: Userfaultfd
    handlings: list[Handling]
    zeropage: list[bool]

    def pump(self, poll_max_ns: int) -> DestinationPump:
        """Build the pump that serves this memory's faults."""
        return DestinationPump(
            self.layout,
            self.mappings,
            self.uffd.fd,
            demand=[one.demand for one in self.handlings],
            push=[one.push for one in self.handlings],
            zeropage=self.zeropage,
            poll_max_ns=poll_max_ns,
        )

    def trap_no_more(self) -> None:
        """Stop trapping; only once every page's content is here, for what is missing then reads as zeros."""
        for mapping in self.mappings:
            self.uffd.unregister(mapping.address, mapping.region.size)
            mapping.allow_huge_pages()

    def close(self) -> None:
        """Give everything back. Whoever waits in a fault goes on, on zeros: nobody may be there any more."""
        self.uffd.close()
        for mapping in self.mappings:
            mapping.close()


def prepare(offer: LayoutOffer, mode: str, kinds: frozenset[str], types: MemoryTypes = MEMORY_TYPES) -> Memory:
    """Check the offer against this host and make its memory ready for a guest.

    `types` are the memory types by name, those with a place of this host's choice among them. Raises UsageError (memory
    of such a type or size is not had anywhere like this), HostError (this host lacks room, permission or a feature),
    GuestError. What was allocated by then is given back.
    """
    if offer.guest.kind not in kinds:
        known = ", ".join(sorted(kinds))
        raise GuestError(f"this agent has no guest of kind {offer.guest.kind!r}: known are {known}")
    try:
        layout = offer.layout()
    except ProtocolError as error:
        raise UsageError(str(error)) from error
    _check(layout, types)
    handlings = [handling(mode, region.type) for region in layout.regions]
    with ExitStack() as undo:
        uffd = undo.enter_context(_open(layout, handlings))
        mappings = []
        for region, way in zip(layout.regions, handlings, strict=True):
            mapping = undo.enter_context(_allocate(types[region.type], region, way))
            mappings.append(mapping)
            _register(uffd, mapping, way)
        undo.pop_all()
        zeropage = [memory_type(region.type).zero_way(alias=False) is PlacingWay.ZEROPAGE for region in layout.regions]
        return Memory(layout, mappings, uffd, handlings, zeropage)


def _check(layout: Layout, types: MemoryTypes) -> None:
    """Compare types, page sizes, and the room that all regions of one type need together."""
    wanted: dict[str, int] = {}
    for region in layout.regions:
        memory_type(region.type).check_region(region)
        wanted[region.type] = wanted.get(region.type, 0) + region.size
    for name, size in wanted.items():
        try:
            types[name].check_room(size)
        except HostError as error:
            raise RoomError(str(error)) from error


def _modes(region: Region, way: Handling) -> Mode:
    return memory_type(region.type).modes_for(alias=way.minor)


def _open(layout: Layout, handlings: list[Handling]) -> Userfaultfd:
    """Open a userfaultfd with what all regions need. A user-mode-only one will not do: it serves no system calls."""
    # Two vCPUs on one page are two faults, and one that is told of again is not: only the thread's id tells.
    required = Feature.THREAD_ID
    for region, way in zip(layout.regions, handlings, strict=True):
        required |= memory_type(region.type).features_for(_modes(region, way))
        if Placement.MOVE in {way.demand, way.push}:
            required |= Feature.MOVE
    return Userfaultfd.open(required)


def _allocate(kind: MemoryType, region: Region, way: Handling) -> Mapping:
    try:
        return kind.allocate(region, alias=way.alias)
    except HostError as error:
        raise RoomError(str(error)) from error


def _register(uffd: Userfaultfd, mapping: Mapping, way: Handling) -> None:
    """Trap the region's faults and see that every way of placing that may be used was granted."""
    kind = memory_type(mapping.region.type)
    granted = uffd.register(mapping.address, mapping.region.size, _modes(mapping.region, way))
    lacking = kind.ioctls_for(_WAYS[way.demand], _WAYS[way.push]) & ~granted
    if lacking:
        names = ", ".join(bit.name or str(bit) for bit in Ioctl(lacking))
        raise HostError(f"region {mapping.region.index} ({mapping.region.type}): the kernel does not grant {names}")
