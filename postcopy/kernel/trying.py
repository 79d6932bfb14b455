"""What REGISTER's answer is worth: each ioctl that it lists is performed once, on a page of that memory.

A registered page enters; which of the ioctls were refused, and how, leaves. The answer alone does not tell: MOVE is
listed for shmem and hugetlb, and refused there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from postcopy.errors import KernelError
from postcopy.kernel import calls
from postcopy.kernel.abi import Ioctl
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.outcome import Outcome, Placed
from postcopy.kernel.userfaultfd import Userfaultfd

# These take a page of the memory itself.
TAKES_A_PAGE = Ioctl.COPY | Ioctl.CONTINUE


def perform(uffd: Userfaultfd, mapping: Mapping, granted: Ioctl) -> dict[Ioctl, str]:
    """Perform what is granted on the first page of `mapping`, each on a fresh one; return refusals by errno's name.

    All of the mapping is given back. Ioctls that are none of a page's are left out.
    """
    refusals = {}
    for ioctl in granted:
        way = _WAYS.get(ioctl)
        if way is None:
            continue
        _refresh(mapping)
        try:
            placed = way(uffd, mapping)
        except KernelError as refused:
            refusals[ioctl] = errno.errorcode.get(refused.number, str(refused.number))
        else:
            if placed is not None and placed.outcome is not Outcome.PLACED:
                refusals[ioctl] = placed.outcome.name
    _refresh(mapping)
    return refusals


def _refresh(mapping: Mapping) -> None:
    """Make the page as it was before anybody placed something there, or poisoned it."""
    if mapping.fd >= 0:
        mapping.punch_hole(0, mapping.region.page_size)
    calls.advise(mapping.address, mapping.region.page_size, calls.MADV_DONTNEED)


def _wake(uffd: Userfaultfd, mapping: Mapping) -> None:
    uffd.wake(mapping.address, mapping.region.page_size)


def _copy(uffd: Userfaultfd, mapping: Mapping) -> Placed:
    return uffd.copy(mapping.address, bytes(mapping.region.page_size))


def _zeropage(uffd: Userfaultfd, mapping: Mapping) -> Placed:
    return uffd.zeropage(mapping.address, mapping.region.page_size)


def _move(uffd: Userfaultfd, mapping: Mapping) -> Placed:
    size = mapping.region.page_size
    source = calls.map_anonymous(size)
    try:
        calls.write_memory(source, b"x")
        return uffd.move(mapping.address, source, size)
    finally:
        calls.unmap(source, size)


def _continue(uffd: Userfaultfd, mapping: Mapping) -> Placed:
    mapping.fill_holes(0, mapping.region.page_size)
    return uffd.continue_(mapping.address, mapping.region.page_size)


def _poison(uffd: Userfaultfd, mapping: Mapping) -> Placed:
    return uffd.poison(mapping.address, mapping.region.page_size)


def _writeprotect(uffd: Userfaultfd, mapping: Mapping) -> Placed:
    uffd.writeprotect(mapping.address, mapping.region.page_size, protect=True)
    # Taken away again: giving the page back would leave it.
    return uffd.writeprotect(mapping.address, mapping.region.page_size, protect=False)


_WAYS: dict[Ioctl, Callable[[Userfaultfd, Mapping], Placed | None]] = {
    Ioctl.WAKE: _wake,
    Ioctl.COPY: _copy,
    Ioctl.ZEROPAGE: _zeropage,
    Ioctl.MOVE: _move,
    Ioctl.CONTINUE: _continue,
    Ioctl.POISON: _poison,
    Ioctl.WRITEPROTECT: _writeprotect,
}
