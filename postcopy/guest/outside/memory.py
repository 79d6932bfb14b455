"""An outside VMM's memory as a migration's: the pump places into it from here, and nothing of it is mapped here.

A hand-over and an offer that agree enter; memory for a pump leaves.
"""

from __future__ import annotations

import os
import time

from postcopy.errors import HostError, KernelError, ProtocolError, UsageError
from postcopy.guest.outside.handing import HandedOver
from postcopy.kernel import Mapping, calls
from postcopy.link.placement import HANDLINGS
from postcopy.link.prepare import Memory
from postcopy.pages.regions import Layout, Region
from postcopy.pump.destination import DestinationPump
from postcopy.pump.histogram import Histogram
from postcopy.pump.regions import Removal
from postcopy.wire.control import LayoutOffer

_SMALL_PAGE = 4096


class ForeignMapping(Mapping):
    """A region at an address of the VMM's. Its file, if it came along, is mapped here as the alias."""

    def __init__(self, region: Region, address: int, fd: int, fd_offset: int) -> None:
        self.region = region
        self.address = address
        self.alias = 0
        self.fd = fd
        self.fd_offset = fd_offset
        self._file_name = None
        if fd >= 0:
            try:
                self.alias = calls.map_shared(fd, region.size, fd_offset)
                calls.advise(self.alias, region.size, calls.MADV_DONTDUMP)
                calls.advise_huge_pages(self.alias, region.size, allow=False)
            except KernelError as refused:
                self.close()
                raise HostError(f"mapping {region.index}: its file cannot be mapped here: {refused}") from refused

    def close(self) -> None:
        """Give back what is this process's."""
        self.address = 0
        super().close()


class OutsideGuest:
    """The VMM itself, as far as a migration deals with it: it runs already, and starting it is to serve its faults."""

    kind = "outside"
    vcpus = 1
    last_step_at: float | None = None
    stall = Histogram()

    def __init__(self) -> None:
        self.first_step_at: float | None = None

    def load(self, _state: object) -> OutsideGuest:
        """Be the guest: its state is its own."""
        return self

    def start(self) -> None:
        """Take note of the time."""
        self.first_step_at = time.monotonic()

    def stop(self, deadline: float = 10.0) -> None:
        """Do nothing: nobody here may stop it."""

    def save(self) -> dict[str, object]:
        """Return nothing: see stop()."""
        return {}

    def close(self) -> None:
        """Do nothing: the process ends when it likes."""


class OutsideMemory(Memory):
    """Memory that was handed over. Its userfaultfd and its process are the hand-over's, and stay that.

    `maps`: where its page maps are kept, if they are.
    """

    maps: list[int] | None = None

    @classmethod
    def of(cls, handed: HandedOver, offer: LayoutOffer) -> OutsideMemory:
        """Take the memory for what is offered; UsageError where they do not agree."""
        try:
            layout = offer.layout()
        except ProtocolError as error:
            raise UsageError(str(error)) from error
        _check_agreement(handed, layout)
        handling = HANDLINGS["minor" if handed.memory_fd >= 0 else "missing"]["shmem"]
        mappings: list[Mapping] = []
        try:
            for region, given in zip(layout.regions, handed.message.mappings, strict=True):
                fd = os.dup(handed.memory_fd) if handed.memory_fd >= 0 else -1
                mappings.append(ForeignMapping(region, given.address, fd, given.offset))
        except BaseException:
            for mapping in mappings:
                mapping.close()
            raise
        zeropage = [region.page_size == _SMALL_PAGE for region in layout.regions]
        memory = cls(layout, mappings, handed.uffd, [handling] * len(mappings), zeropage, OutsideGuest())
        memory.maps = handed.kept.maps if handed.kept is not None else None
        return memory

    def pump(self, poll_max_ns: int, beat_ns: int = 0) -> DestinationPump | None:
        """Build the pump that serves this memory's faults."""
        if self.uffd is None:
            return None
        return DestinationPump(
            self.layout,
            self.mappings,
            self.uffd.fd,
            demand=[one.demand for one in self.handlings],
            push=[one.push for one in self.handlings],
            zeropage=self.zeropage,
            poll_max_ns=poll_max_ns,
            beat_ns=beat_ns,
            removal=[Removal.DISCARDS] * len(self.mappings),
            foreign=True,
            maps=self.maps,
        )

    def trap_no_more(self) -> None:
        """Do nothing: the process registered its memory, and goes on giving pages back."""

    def close(self) -> None:
        """Give back what is this process's."""
        for mapping in self.mappings:
            mapping.close()


def _check_agreement(handed: HandedOver, layout: Layout) -> None:
    given = handed.message.mappings
    if len(layout.regions) != len(given):
        raise UsageError(f"{len(layout.regions)} regions are offered, {handed.process} has {len(given)} mappings")
    for region, one in zip(layout.regions, given, strict=True):
        if (region.size, region.page_size) != (one.size, one.page_size):
            raise UsageError(
                f"region {region.index} has {region.size} bytes in pages of {region.page_size}, the mapping of "
                f"{handed.process} {one.size} in pages of {one.page_size}"
            )
