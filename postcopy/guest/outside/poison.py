"""The end of memory whose pages never come: whoever touches one gets SIGBUS at once, no zeros, and waits no longer.

A userfaultfd and what is known of each page enter; how many pages were poisoned leaves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from postcopy.errors import HostError, KernelError
from postcopy.kernel import Outcome, Userfaultfd
from postcopy.kernel.events import Fork, Remove, Unmap
from postcopy.limits import MAPPING_TRIES_MAX, POISON_RETRIES_MAX
from postcopy.pages.ledger import PageState

# By what a pump knows of a page: 1 where its content never came.
_LOST = bytes(state not in {PageState.PLACED, PageState.ZERO, PageState.DROPPED} for state in range(256))


class Poisoner:
    """Poisons every page that `maps`, a byte of state for each page, does not know to be here; no pump may run.

    On the way it reads what the process tells: pages given back are zeros, not lost. `regions`: (address, page size).
    """

    def __init__(self, uffd: Userfaultfd, regions: Sequence[tuple[int, int]], maps: Sequence[bytes]) -> None:
        self._uffd = uffd
        self._regions = regions
        self._lost = [bytearray(one.translate(_LOST)) for one in maps]

    def run(self) -> int:
        """Poison what is lost; return how many pages.

        HostError where this kernel cannot (before 6.6): then nobody must let go of the userfaultfd.
        """
        return sum(self._region(*region, lost) for region, lost in zip(self._regions, self._lost, strict=True))

    def _region(self, address: int, page_size: int, lost: bytearray) -> int:
        poisoned = page = retries = 0
        most = len(lost)
        while (page := lost.find(1, page)) >= 0:
            stop = lost.find(0, page)
            count = min(most, (stop if stop >= 0 else len(lost)) - page)
            try:
                placed = self._uffd.poison(address + page * page_size, count * page_size)
            except KernelError as refused:
                raise HostError(
                    f"this kernel cannot poison pages that never come (Linux 6.6 can): {refused}"
                ) from refused
            if placed.bytes:
                page += placed.bytes // page_size
                poisoned += placed.bytes // page_size
                most, retries = min(2 * most, len(lost)), 0
            elif placed.outcome is Outcome.RETRY:
                retries += 1
                if retries > POISON_RETRIES_MAX:
                    raise HostError(f"the memory at {address:#x} keeps changing and cannot be poisoned")
                self._read()
            elif placed.outcome is Outcome.GONE and count > 1:
                most = count // 2  # of a run it may be so for some pages only
            else:
                page += 1  # it is there, or gone
        return poisoned

    def _read(self) -> None:
        """Take note of what the process tells; a child of it gets none of the missing pages, and no zeros."""
        for message in self._uffd.read():
            if isinstance(message, Remove | Unmap):
                self._forget(message.start, message.stop)
            elif isinstance(message, Fork):
                with _child(message) as child, suppress(HostError):
                    # what its parent has may have come behind the fork: all that is not there is lost
                    Poisoner(child, self._regions, [bytes(len(one)) for one in self._lost]).run()

    def _forget(self, start: int, stop: int) -> None:
        for (address, page_size), lost in zip(self._regions, self._lost, strict=True):
            # of a page that was given back in part the rest is lost all the same
            first = max(0, -((address - start) // page_size))
            last = min(len(lost), (stop - address) // page_size)
            if first < last:
                lost[first:last] = bytes(last - first)


def _child(message: Fork) -> Userfaultfd:
    """Return a child's userfaultfd, which blocks where its parent's was made to."""
    os.set_blocking(message.descriptor, False)
    return Userfaultfd.from_fd(message.descriptor)


def poison_what_is_there(
    uffd: Userfaultfd, regions: Sequence[tuple[int, int, int]]
) -> dict[tuple[int, int, int], KernelError]:
    """Poison what is missing of each (address, length, page size), which may be trapped in parts or not at all.

    A range that is not is halved. The process's children are done like it, those of each that are told of on the way.
    Returns what the kernel refused: a range that makes no sense, or all of it where it cannot poison (before 6.6).
    """
    refused = {}
    for region in regions:
        try:
            _poison_what_is_there(uffd, regions, *region)
        except KernelError as error:
            refused[region] = error
    return refused


def _poison_what_is_there(
    uffd: Userfaultfd, regions: Sequence[tuple[int, int, int]], address: int, length: int, page_size: int
) -> None:
    left = [(address, length)]
    for _ in range(MAPPING_TRIES_MAX):
        if not left:
            return
        start, size = left.pop()
        placed = uffd.poison(start, size)
        if placed.outcome is Outcome.GONE and size > page_size:
            half = size // page_size // 2 * page_size
            left += [(start + half, size - half), (start, half)]
            continue
        if placed.outcome is Outcome.RETRY and not placed.bytes:
            for message in uffd.read():
                if isinstance(message, Fork):
                    with _child(message) as child:
                        poison_what_is_there(child, regions)
            left.append((start, size))
            continue
        done = placed.bytes or page_size  # one page that is there, or is not trapped
        if done < size:
            left.append((start + done, size - done))
