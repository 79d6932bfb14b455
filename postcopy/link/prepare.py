"""The destination's memory: everything about it that can fail is done here, before the source's guest is stopped.

An offer of another agent enters; allocated, registered memory with a pump's description leaves, or the one reason why
this host cannot have the guest. Runs in a thread: a host under pressure takes its time for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping as ReadOnly
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from postcopy.errors import HostError, KernelError, PostcopyError, ProtocolError, UsageError
from postcopy.kernel import MEMORY_TYPES, Feature, Ioctl, Mapping, MemoryType, Mode, Userfaultfd, memory_type
from postcopy.kernel import Way as PlacingWay
from postcopy.kernel.shmem import require_room
from postcopy.limits import FRAME_BYTES_MAX
from postcopy.link.guest import EmptyGuest, Kinds
from postcopy.link.placement import Handling, handling
from postcopy.link.views import Views
from postcopy.pages.regions import Layout, Region
from postcopy.pages.units import format_size
from postcopy.pump.destination import DestinationPump
from postcopy.pump.regions import Placement, Removal
from postcopy.wire.control import GuestOffer, LayoutOffer

log = logging.getLogger("postcopy.session")

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
    """The guest's memory at the destination: trapped, empty, and owned by whoever holds this.

    `guest` is the rest of what the guest needs. `resident`: the memory was handed over, all of it is in its files
    already. Then it is trapped by choice, and without a userfaultfd not at all. `discards`: see removals().
    """

    layout: Layout
    mappings: list[Mapping]
    uffd: Userfaultfd | None
    handlings: list[Handling]
    zeropage: list[bool]
    guest: EmptyGuest
    resident: bool = False
    discards: bool = False
    views: Views = field(default_factory=Views)

    def pump(self, poll_max_ns: int, beat_ns: int = 0) -> DestinationPump | None:
        """Build the pump that serves this memory's faults; None where none is trapped."""
        if self.uffd is None:
            return None
        pump = DestinationPump(
            self.layout,
            self.mappings,
            self.uffd.fd,
            demand=[one.demand for one in self.handlings],
            push=[one.push for one in self.handlings],
            zeropage=self.zeropage,
            poll_max_ns=poll_max_ns,
            beat_ns=beat_ns,
            removal=removals(self.layout, discards=self.discards),
        )
        if self.resident:
            pump.adopt()
        return pump

    def give_back(self, pump: DestinationPump | None, region: int, offset: int, length: int) -> None:
        """Take pages away from the guest: zeros from now on, and no copy of them is placed any more. In a thread."""
        self.layout.region(region)
        if pump is not None:
            pump.discard(region, offset, length)  # first: what is placed by then, the hole takes away
        self.mappings[region].punch_hole(offset, length)

    def add_view(self, pump: DestinationPump | None, uffd: Userfaultfd, addresses: ReadOnly[int, int]) -> None:
        """Serve another process's mapping of some regions' files, too; see Destination.add_view."""
        modes = [_modes(region, way) for region, way in zip(self.layout.regions, self.handlings, strict=False)]
        self.views.add(None if self.resident else pump, uffd, addresses, self.mappings, modes)

    def trap_no_more(self) -> None:
        """Stop trapping; only once every page's content is here, for what is missing then reads as zeros.

        Every region is tried before the first KernelError is raised: somebody must go on serving what is still trapped.
        """
        if self.uffd is None:
            return
        refused: list[KernelError] = []
        for mapping in self.mappings:
            try:
                self.uffd.unregister(mapping.address, mapping.region.size)
            except KernelError as error:
                refused.append(error)
        for mapping in self.mappings:
            with suppress(KernelError):  # it is only asked for
                mapping.allow_huge_pages()
        self.views.trap_no_more()
        if refused:
            raise refused[0]

    def close(self) -> None:
        """Give everything back. Whoever waits in a fault goes on, on zeros: nobody may be there any more."""
        self.guest.close()
        if self.uffd is not None:
            self.uffd.close()
        self.views.close()
        for mapping in self.mappings:
            mapping.close()


def prepare(
    offer: LayoutOffer, mode: str, kinds: Kinds, types: MemoryTypes = MEMORY_TYPES, *, discards: bool = False
) -> Memory:
    """Check the offer against this host and make its memory ready for a guest.

    `types` are the memory types by name, those with a place of this host's choice among them; `discards` is for
    removals(). Raises UsageError (memory of such a type or size is not had anywhere like this), HostError (this host
    lacks room, permission or a feature), GuestError. What was allocated by then is given back.
    """
    check_guest(offer.guest, kinds)
    try:
        layout = offer.layout()
    except ProtocolError as error:
        raise UsageError(str(error)) from error
    handlings = _check(layout, offer, mode, types)
    with ExitStack() as undo:
        uffd = undo.enter_context(open_userfaultfd(layout, handlings, discards=discards))
        mappings = []
        for region, way in zip(layout.regions, handlings, strict=True):
            mapping = undo.enter_context(_allocate(types[region.type], region, way, offer.data_of(region.index)))
            mappings.append(mapping)
            register(uffd, mapping, way)
        zeropage = [memory_type(region.type).zero_way(alias=False) is PlacingWay.ZEROPAGE for region in layout.regions]
        guest = kinds[offer.guest.kind].empty(mappings, offer.guest.vcpus)
        undo.pop_all()
        return Memory(layout, mappings, uffd, handlings, zeropage, guest, discards=discards)


def check_guest(guest: GuestOffer, kinds: Kinds) -> None:
    """Refuse now what could not be loaded later, with the guest standing still."""
    if guest.kind not in kinds:
        raise GuestError(f"this agent has no guest of kind {guest.kind!r}: known are {', '.join(sorted(kinds))}")
    kind = kinds[guest.kind]
    kind.check_host()
    if guest.vcpus > kind.vcpus_max:
        raise GuestError(f"a guest of {guest.vcpus} vCPUs: this agent runs at most {kind.vcpus_max} of {guest.kind}")


def _check(layout: Layout, offer: LayoutOffer, mode: str, types: MemoryTypes) -> list[Handling]:
    """Compare types, page sizes, and the room that all regions of one type need together; return how each is handled.

    A huge page that is not received where it stays is received in a buffer of its size, which is memory, too.
    """
    wanted: dict[str, int] = {}
    for region in layout.regions:
        memory_type(region.type).check_region(region)
        room = types[region.type].room_for(region.size, offer.data_of(region.index))
        wanted[region.type] = wanted.get(region.type, 0) + room
    for name, size in wanted.items():
        try:
            types[name].check_room(size)
        except HostError as error:
            raise RoomError(str(error)) from error
    _warn_of_growth(layout, wanted, types)
    handlings = [handling(mode, region.type) for region in layout.regions]
    staging = staging_bytes(layout, handlings)
    if staging > 0:
        try:
            require_room(
                "buffers that receive huge pages", staging + wanted.get("shmem", 0) + wanted.get("anonymous", 0)
            )
        except HostError as error:
            raise RoomError(str(error)) from error
    return handlings


def _warn_of_growth(layout: Layout, wanted: dict[str, int], types: MemoryTypes) -> None:
    """Say where a guest comes that this host could not hold if it wrote to all of its memory, as its source may not."""
    for name, size in wanted.items():
        whole = sum(region.size for region in layout.regions if region.type == name)
        try:
            if whole > size:
                types[name].check_room(whole)
        except HostError as error:
            log.warning(
                "destination: %s of data come, and the guest must not fill its memory: %s", format_size(size), error
            )


def staging_bytes(layout: Layout, handlings: list[Handling]) -> int:
    """Return what the pump's buffers take for pages larger than a frame: one for each connection, one of zeros."""
    total = 0
    for way in ("demand", "push"):
        staged = (
            region.page_size
            for region, handled in zip(layout.regions, handlings, strict=True)
            if getattr(handled, way) is not Placement.CONTINUE and region.page_size > FRAME_BYTES_MAX
        )
        total += max(staged, default=0)
    zeros = (
        region.page_size
        for region, handled in zip(layout.regions, handlings, strict=True)
        if not handled.alias and region.page_size > FRAME_BYTES_MAX
    )
    return total + max(zeros, default=0)


def removals(layout: Layout, *, discards: bool = False) -> list[Removal]:
    """Return what the kernel's word that the guest gave pages back means for each region.

    Private memory has lost them then. Of a shared file's pages it may only have given up the mapping, see the pump's
    README, unless somebody knows that the guest does not do that (`discards`). Where nothing is lost the kernel is not
    asked to tell, since all placing stops until each event is read.
    """
    private = [discards or not memory_type(region.type).alias for region in layout.regions]
    if not any(private):
        return [Removal.UNTOLD] * len(private)
    return [Removal.DISCARDS if one else Removal.KEEPS for one in private]


def _modes(region: Region, way: Handling) -> Mode:
    return memory_type(region.type).modes_for(alias=way.minor)


def open_userfaultfd(layout: Layout, handlings: list[Handling], *, discards: bool = False) -> Userfaultfd:
    """Open a userfaultfd with what all regions need. A user-mode-only one will not do: it serves no system calls."""
    # Two vCPUs on one page are two faults, and one that is told of again is not: only the thread's id tells.
    required = Feature.THREAD_ID
    for region, way in zip(layout.regions, handlings, strict=True):
        required |= memory_type(region.type).features_for(_modes(region, way))
        if Placement.MOVE in {way.demand, way.push}:
            required |= Feature.MOVE
    if Removal.DISCARDS in removals(layout, discards=discards):
        required |= Feature.EVENT_REMOVE
    return Userfaultfd.open(required)


def _allocate(kind: MemoryType, region: Region, way: Handling, data: int) -> Mapping:
    try:
        return kind.allocate(region, alias=way.alias, data=data)
    except HostError as error:
        raise RoomError(str(error)) from error


def register(uffd: Userfaultfd, mapping: Mapping, way: Handling) -> None:
    """Trap the region's faults and see that every way of placing that may be used was granted."""
    kind = memory_type(mapping.region.type)
    granted = uffd.register(mapping.address, mapping.region.size, _modes(mapping.region, way))
    lacking = kind.ioctls_for(_WAYS[way.demand], _WAYS[way.push]) & ~granted
    if lacking:
        names = ", ".join(bit.name or str(bit) for bit in Ioctl(lacking))
        raise HostError(f"region {mapping.region.index} ({mapping.region.type}): the kernel does not grant {names}")
