"""Where things are in a KVM guest: its addresses, the pages that are its own, and what is in them.

In: how much memory it has, how many vCPUs. Out: addresses, and the bytes of every page of its own but the vCPUs'
blocks, which C makes. Guest-physical and virtual addresses are the same. Memory begins at 4 GiB: below that a PC has
holes, and KVM pages of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from postcopy.guest.kvm.code import PROGRAM
from postcopy.guest.state import GUEST_PAGE_BYTES

MEMORY_AT = 4 << 30
WINDOWS_AT = 2 << 20

_PRESENT, _WRITABLE, _ACCESSED, _DIRTY, _LARGE = 1, 2, 1 << 5, 1 << 6, 1 << 7
# Accessed and dirty from the beginning: the processor has nothing to write there, so tables stay what they are.
_TABLE = _PRESENT | _WRITABLE | _ACCESSED
_PAGE = _PRESENT | _WRITABLE | _ACCESSED | _DIRTY | _LARGE
_LARGE_BYTES = 2 << 20
_ENTRIES = 512
_GIB = 1 << 30

# In pages from the beginning of the memory.
_CODE, _LEVEL4, _LEVEL3, _LEVEL2_LOW, _LEVEL2 = range(5)


class OwnPages:
    """The first pages of a guest's memory, which hold what it runs on; the content follows them.

    The program, then the page tables (2 MiB pages: every processor with long mode has them), then a block each vCPU.
    """

    def __init__(self, pages: int, vcpus: int, window_bytes: int) -> None:
        self._gibs = -(-pages * GUEST_PAGE_BYTES // _GIB)
        self._windows = -(-vcpus * window_bytes // _LARGE_BYTES)
        self._last_bytes = pages * GUEST_PAGE_BYTES
        self.count = _LEVEL2 + self._gibs + vcpus

    @property
    def level4_at(self) -> int:
        """The address of the page table: CR3."""
        return _at(_LEVEL4)

    @property
    def code_at(self) -> int:
        """Where the program is."""
        return _at(_CODE)

    @property
    def content_at(self) -> int:
        """Where the content begins."""
        return _at(self.count)

    def block_page(self, vcpu: int) -> int:
        """Return the page that is a vCPU's block, counted from the beginning of the memory."""
        return _LEVEL2 + self._gibs + vcpu

    def block_at(self, vcpu: int) -> int:
        """Return the address of a vCPU's block."""
        return _at(self.block_page(vcpu))

    def fixed(self) -> Iterator[tuple[int, bytes]]:
        """Yield each page that never changes, counted from the beginning of the memory, with its bytes."""
        yield _CODE, PROGRAM.ljust(GUEST_PAGE_BYTES, b"\0")
        yield _LEVEL4, _table({0: _at(_LEVEL3) | _TABLE})
        level2 = {MEMORY_AT // _GIB + gib: _at(_LEVEL2 + gib) | _TABLE for gib in range(self._gibs)}
        yield _LEVEL3, _table({0: _at(_LEVEL2_LOW) | _TABLE, **level2})
        first = WINDOWS_AT // _LARGE_BYTES
        yield _LEVEL2_LOW, _table({n: n * _LARGE_BYTES | _PAGE for n in range(first, first + self._windows)})
        for gib in range(self._gibs):
            mapped = -(-min(_GIB, self._last_bytes - gib * _GIB) // _LARGE_BYTES)
            begin = MEMORY_AT + gib * _GIB
            yield _LEVEL2 + gib, _table({n: begin + n * _LARGE_BYTES | _PAGE for n in range(mapped)})


def _at(page: int) -> int:
    return MEMORY_AT + page * GUEST_PAGE_BYTES


def _table(entries: dict[int, int]) -> bytes:
    return struct.pack(f"={_ENTRIES}Q", *(entries.get(n, 0) for n in range(_ENTRIES)))
