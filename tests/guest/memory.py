"""Memory for guests under test: a real Mapping that can be read and spoiled, and a userfaultfd over it."""

from __future__ import annotations

import ctypes
import os
from typing import Self

from postcopy.kernel import Mapping, Mode, Outcome, Userfaultfd, memory_type
from postcopy.kernel.events import PageFault
from postcopy.pages import Region

PAGE = 4096


class Memory:
    """A region of `pages` pages of 4 KiB; has what a Mapping has, and its bytes."""

    def __init__(self, pages: int, *, kind: str = "shmem") -> None:
        size = pages * PAGE
        if kind == "anonymous":
            self.region = Region(0, kind, PAGE, size)
            self.mapping = Mapping(self.region, -1, alias=False)
        else:
            wanted = memory_type(kind)
            self.region = Region(0, kind, wanted.page_size, size)
            self.mapping = wanted.allocate(self.region, alias=False)
        self.address = self.mapping.address
        self.fd = self.mapping.fd

    def read(self) -> bytes:
        return ctypes.string_at(self.address, self.region.size)

    def write(self, data: bytes) -> None:
        ctypes.memmove(self.address, data, self.region.size)

    def flip(self, offset: int, bit: int) -> None:
        byte = ctypes.c_ubyte.from_address(self.address + offset)
        byte.value ^= 1 << bit

    def allocated(self) -> int:
        """Return how many 4 KiB pages the file really has."""
        return os.fstat(self.fd).st_blocks * 512 // PAGE

    def close(self) -> None:
        self.mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Faults:
    """A userfaultfd over a Memory: who touches a page waits until `serve`. For child processes only."""

    def __init__(self, memory: Memory) -> None:
        self.uffd = Userfaultfd.open()
        self.uffd.register(memory.address, memory.region.size, Mode.MISSING)
        self.unread: list[int] = []

    def next(self) -> int:
        """Return the address of the page that a thread now waits for."""
        while not self.unread:
            assert self.uffd.poll(10.0), "no fault came"
            faults = self.uffd.read()
            assert all(isinstance(fault, PageFault) for fault in faults)
            self.unread += [fault.address for fault in faults if isinstance(fault, PageFault)]
        return self.unread.pop(0)

    def serve(self, address: int) -> None:
        placed = self.uffd.zeropage(address, PAGE)
        assert placed.outcome is Outcome.PLACED
