"""Views: other processes that map the guest's files themselves, each with a userfaultfd of its own.

A userfaultfd and addresses enter; its ranges are trapped as the guest's own are, and given to the pump, until all is
here or the memory goes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping as ReadOnly
from collections.abc import Sequence
from contextlib import suppress

from postcopy.errors import HostError, KernelError, UsageError
from postcopy.kernel import Feature, Mapping, Mode, Userfaultfd
from postcopy.pump.destination import DestinationPump

# What would be told beside faults says nothing about this process's mapping, and none of it can be served: a child
# would have a userfaultfd of its own, a moved mapping another address. With SIGBUS nothing is told at all.
REFUSED = Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.SIGBUS

Ranges = list[tuple[int, int]]


class Views:
    """Those of one guest's memory. Any thread may call its methods."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._views: list[tuple[Userfaultfd, Ranges]] = []
        self._trapped = True

    def add(
        self,
        pump: DestinationPump | None,
        uffd: Userfaultfd,
        addresses: ReadOnly[int, int],
        mappings: Sequence[Mapping],
        modes: Sequence[Mode],
    ) -> None:
        """Trap and serve what lies at `addresses`, by region, in the process of `uffd`; see Destination.add_view."""
        refused = uffd.features & REFUSED
        if refused:
            names = ", ".join(bit.name or hex(bit) for bit in refused)
            raise UsageError(f"a view's userfaultfd must be opened without {names}")
        if not addresses:
            raise UsageError("a view without a region")
        for number in addresses:
            if not 0 <= number < len(mappings):
                raise UsageError(f"there is no region {number}: the guest's memory has {len(mappings)}")
            if mappings[number].fd < 0:
                raise UsageError(
                    f"region {number} ({mappings[number].region.type}) has no file: nobody else can map it"
                )
        ranges = [(address, mappings[number].region.size) for number, address in addresses.items()]
        with self._guard:
            if self._trapped and pump is not None:
                self._serve(pump, uffd, addresses, mappings, modes)
            else:
                _release(uffd, ranges)  # all is here: what it would wait for has come
            self._views.append((uffd, ranges))

    def _serve(
        self,
        pump: DestinationPump,
        uffd: Userfaultfd,
        addresses: ReadOnly[int, int],
        mappings: Sequence[Mapping],
        modes: Sequence[Mode],
    ) -> None:
        os.set_blocking(uffd.fd, False)
        # It has registered them already, or might have touched them. Once more costs nothing, and sees to it that they
        # are mapped, whole, trapped by this very descriptor, and for minor faults, too, where pages come in place.
        for number, address in addresses.items():
            region = mappings[number].region
            try:
                uffd.register(address, region.size, modes[number])
            except KernelError as error:
                raise HostError(f"region {number} ({region.type}) as another process maps it: {error}") from error
        pump.add_view(uffd.fd, [addresses.get(number, 0) for number in range(len(mappings))])

    def trap_no_more(self) -> None:
        """Let every view go on by itself: each page's content is in the files."""
        with self._guard:
            self._trapped = False
            for uffd, ranges in self._views:
                _release(uffd, ranges)

    def close(self) -> None:
        """Close all descriptors; the pump has ended. Whoever waits goes on, on what the file holds."""
        with self._guard:
            self._trapped = False
            for uffd, _ in self._views:
                uffd.close()
            self._views.clear()


def _release(uffd: Userfaultfd, ranges: Ranges) -> None:
    for address, length in ranges:
        with suppress(KernelError):  # the process has gone, or has taken the mapping away
            uffd.unregister(address, length)
