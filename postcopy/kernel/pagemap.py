"""PAGEMAP_SCAN: which pages of an address space are what, and which were written since they were last protected.

In: a process and a range. Out: runs of pages with their categories. With write protection in its asynchronous form
(Feature.WP_ASYNC) scan and re-protection are one step, so that no write between the two is lost: a log of dirty pages
without a single fault message. Linux 6.7. Sources: PAGEMAP_SCAN(2const), the kernel's admin-guide/mm/pagemap.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from errno import EINVAL
from types import TracebackType
from typing import Literal, NamedTuple, Self

from postcopy.errors import KernelError
from postcopy.kernel import abi, calls
from postcopy.kernel.abi import Category, ScanFlag

# One call answers with at most this many runs, 12 KiB of them; the scan goes on behind the last one by itself.
BATCH_RANGES = 512
NO_CATEGORY = Category(0)
NO_FLAGS = ScanFlag(0)


class PageRange(NamedTuple):
    """The addresses from `start` up to `stop`, whose pages are all of these categories."""

    start: int
    stop: int
    categories: Category


@dataclass(frozen=True, slots=True)
class Filter:
    """Which pages are wanted: those that have all of `every` and, if `some` is not empty, one of `some`.

    What is in `inverted` counts the other way round there: wanted where the page is not of that category. `report` is
    what a PageRange tells of its pages; neighbours that agree in it are one run.
    """

    every: Category = NO_CATEGORY
    some: Category = NO_CATEGORY
    inverted: Category = NO_CATEGORY
    report: Category = NO_CATEGORY


class Pagemap:
    """The pagemap of one process; close() it, or use `with`. Needs the right to trace that process (ptrace(2))."""

    def __init__(self, process: int | Literal["self"] = "self") -> None:
        path = f"/proc/{process}/pagemap"
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as refused:
            raise KernelError(f"open {path}", refused.errno or EINVAL) from refused

    def scan(self, start: int, stop: int, wanted: Filter, flags: ScanFlag = NO_FLAGS) -> list[PageRange]:
        """Return the runs of wanted pages from address `start` up to `stop`, ascending.

        ScanFlag.WP_MATCHING protects what is returned, in the same step. Raises KernelError: EPERM (CHECK_WPASYNC, and
        part of the range is not registered for write-protect with WP_ASYNC), EINVAL, EFAULT, ENOTTY (before 6.7).
        """
        found: list[PageRange] = []
        vector = bytearray(BATCH_RANGES * abi.SCAN_RANGE.size)
        while start < stop:
            count, start = self._scan_once(start, stop, wanted, flags, vector)
            for first, end, categories in abi.SCAN_RANGE.iter_unpack(memoryview(vector)[: count * abi.SCAN_RANGE.size]):
                _append(found, PageRange(first, end, Category(categories)))
        return found

    def _scan_once(self, start: int, stop: int, wanted: Filter, flags: ScanFlag, vector: bytearray) -> tuple[int, int]:
        """Return how many runs were put into `vector`, and the address up to which the kernel got."""
        with calls.pinned(vector) as vector_address:
            argument = bytearray(
                abi.SCAN_ARGUMENT.pack(
                    abi.SCAN_ARGUMENT.size,
                    flags,
                    start,
                    stop,
                    0,  # walk_end, the kernel's answer
                    vector_address,
                    BATCH_RANGES,
                    0,  # max_pages: no bound but the vector's
                    wanted.inverted,
                    wanted.every,
                    wanted.some,
                    wanted.report,
                )
            )
            count = calls.ioctl(self.fd, abi.IOC_PAGEMAP_SCAN, argument)
        if count < 0:
            raise KernelError("PAGEMAP_SCAN", -count, f"{start:#x} to {stop:#x}")
        reached = abi.SCAN_ARGUMENT.unpack(argument)[4]
        if reached <= start:
            raise KernelError("PAGEMAP_SCAN", EINVAL, f"no progress at {start:#x}")
        return count, reached

    def written(self, start: int, stop: int) -> list[PageRange]:
        """Return the runs written since they were last protected, and leave them as they are.

        Also pages that were never protected count as written.
        """
        return self.scan(start, stop, Filter(every=Category.WRITTEN, report=Category.WRITTEN))

    def written_and_protect(self, start: int, stop: int) -> list[PageRange]:
        """Return the same and protect those pages again, each in one step: a write is in this answer or in the next.

        The range must be registered with Mode.WP on a userfaultfd that has Feature.WP_ASYNC.
        """
        wanted = Filter(every=Category.WRITTEN, report=Category.WRITTEN)
        return self.scan(start, stop, wanted, ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC)

    def close(self) -> None:
        """Close the descriptor; more than once is no harm."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1  # also where closing fails: the number may be another file's by then
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _append(found: list[PageRange], new: PageRange) -> None:
    """Add a run; one that was cut in two because the vector was full becomes one again."""
    if found and found[-1].stop == new.start and found[-1].categories == new.categories:
        found[-1] = PageRange(found[-1].start, new.stop, new.categories)
    else:
        found.append(new)
