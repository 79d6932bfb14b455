"""Memory that the machine has found already, before any run that takes it, of whatever kind it is.

A virtual machine's free memory may not be backed by its host. Who touches it first pays for both, twenty to forty times
what the second pays, and the host, which is told of whole free blocks of 2 MiB, takes them back within seconds. What a
run is about to take enters; afterwards that much was touched and is free again, and the host is not told of it:

- Single pages are taken off a stock of blocks that are free but for one page each. No such block is whole, and the
  kernel breaks up no whole one as long as there are others. The stock is kept from run to run.
- Huge pages stay in their pool, of which nobody tells the host; but one that nobody used since it was reserved was
  never touched. The pool gives back first what it got last, so the pages that are touched here are those the run takes.
- Transparent huge pages take whole blocks, so all that can be done is to touch some just before.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

from agent.bench._floor import ffi
from agent.bench.machine import THP, available_bytes, chosen
from postcopy.errors import HostError
from postcopy.kernel import memory_type
from postcopy.kernel.hugetlb import Hugetlb

MIB = 1 << 20
BLOCK = 2 * MIB
# Beside what a guest has at both ends: two daemons, their page tables, what is on its way.
BESIDE = 256 * MIB
BESIDE_HUGE_PAGES = 8
# Ctrl-C is heeded in between.
CHUNK = 256 * MIB
PAGEMAP = Path("/proc/self/pagemap")

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_MAP_HUGETLB = 0x40000  # with the binary logarithm of the page size from bit 26 on
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in the mmap module
_PAGE_NUMBER = (1 << 55) - 1  # of an entry of /proc/self/pagemap; 0 for whoever may not know


class Warm:
    """Has memory found before runs; what it keeps for that goes with the block."""

    def __init__(self) -> None:
        self._stock: mmap.mmap | None = None
        self._stocked = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._drop()

    def find(self, memory: str, data: int, *, copies: int = 2, thp: bool = False) -> None:
        """Have the machine find what a run takes that has `data` bytes of a memory type, in so many copies.

        `thp`: transparent huge pages are asked for. There is never taken more than is to be had, and what is refused
        is left to the runs.
        """
        taken = copies * data
        kind = memory_type(memory)
        with suppress(OSError):
            if isinstance(kind, Hugetlb):
                _touch_pool(kind, taken // kind.page_size + BESIDE_HUGE_PAGES)
            elif thp or _huge_of_itself(memory):
                self._drop()
                _touch_blocks(taken + BESIDE)
            else:
                self._stock_up(taken + BESIDE)

    def _stock_up(self, size: int) -> None:
        """Have at least so many bytes in stock; a larger stock takes in the smaller one before that is dropped."""
        size = min(size, available_bytes() * 7 // 8) // BLOCK * BLOCK
        if size <= self._stocked:
            return
        memory = mmap.mmap(-1, size, flags=_PRIVATE)
        with suppress(OSError):  # a kernel that has none makes none
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        _populate(memory)
        before = 0
        for kept in (*_one_of_each_block(memory), size):
            if kept > before:
                memory.madvise(mmap.MADV_DONTNEED, before, kept - before)
            before = kept + mmap.PAGESIZE
        self._drop()
        self._stock, self._stocked = memory, size

    def _drop(self) -> None:
        if self._stock is not None:
            self._stock.close()
        self._stock, self._stocked = None, 0


def _huge_of_itself(memory: str) -> bool:
    """Whether this host makes huge pages of it that nobody asked for."""
    file = {"shmem": "shmem_enabled", "anonymous": "enabled"}.get(memory)
    return file is not None and chosen(THP / file) in {"always", "within_size", "force"}


def _touch_pool(huge: Hugetlb, pages: int) -> None:
    """Touch so many huge pages, or as many as there are, and give them back to the pool."""
    try:
        pages = min(pages, huge.pool().unclaimed)
    except HostError:
        return
    if pages:
        size_flag = (huge.page_size.bit_length() - 1) << 26
        with mmap.mmap(-1, pages * huge.page_size, flags=_PRIVATE | _MAP_HUGETLB | size_flag) as memory:
            _populate(memory)


def _touch_blocks(size: int) -> None:
    """Touch so much memory in whole blocks, or half of what there is, and give it back."""
    size = min(size, available_bytes() // 2) // BLOCK * BLOCK
    with mmap.mmap(-1, size, flags=_PRIVATE) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        _populate(memory)


def _populate(memory: mmap.mmap) -> None:
    for offset in range(0, len(memory), CHUNK):
        memory.madvise(_MADV_POPULATE_WRITE, offset, min(CHUNK, len(memory) - offset))


def _one_of_each_block(memory: mmap.mmap) -> Iterator[int]:
    """Return the offset of one page of each physical block, ascending.

    Who may not know where pages are takes one in sixteen: memory that was free in pieces has its neighbours elsewhere.
    """
    with ffi.from_buffer(memory) as start, PAGEMAP.open("rb", buffering=0) as pagemap:
        pagemap.seek(int(ffi.cast("uintptr_t", start)) // mmap.PAGESIZE * 8)
        entries = array("Q", pagemap.read(len(memory) // mmap.PAGESIZE * 8))
    seen = set()
    in_block = BLOCK // mmap.PAGESIZE
    for index, entry in enumerate(entries):
        number = entry & _PAGE_NUMBER
        block = number // in_block if number else ~(index // 16)
        if block not in seen:
            seen.add(block)
            yield index * mmap.PAGESIZE
