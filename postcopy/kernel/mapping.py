"""Mapping: one region's memory in this process.

In: a region and the file behind its memory. Out: the address the guest uses, the address of the alias through which
bytes are received in place, and which parts of the file hold data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from errno import ENXIO
from types import TracebackType
from typing import Self

from postcopy.errors import HostError, KernelError
from postcopy.kernel import calls
from postcopy.pages.regions import Region


class Mapping:
    """A region's memory: `address` is the guest's mapping, `alias` a second one that is never registered (0: none).

    `fd` is the file behind both (-1: none, the memory is private and anonymous). It belongs to the mapping from the
    moment its constructor is entered, whatever comes of it. Neither mapping goes into core dumps: it is the guest's
    memory, and as large as that. Raises HostError where the kernel will not map it.
    """

    def __init__(self, region: Region, fd: int, *, alias: bool, reserve: bool = True) -> None:
        self.region = region
        self.address = 0
        self.alias = 0
        self.fd = fd
        try:
            if fd < 0:
                self.address = calls.map_anonymous(region.size)
            else:
                self.address = calls.map_shared(fd, region.size, reserve=reserve)
            calls.advise(self.address, region.size, calls.MADV_DONTDUMP)
            if alias:
                self.alias = calls.map_shared(fd, region.size, reserve=reserve)
                calls.advise(self.alias, region.size, calls.MADV_DONTDUMP)
        except KernelError as refused:
            self.close()
            raise HostError(f"region {region.index} ({region.type}, {region.size} bytes): {refused}") from refused
        except BaseException:
            self.close()
            raise

    def data_extents(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what may hold data from `start` up to `stop`, ascending, in whole pages.

        What lies between reads as zeros. Asks the file (SEEK_DATA, SEEK_HOLE), so it sees what anybody wrote, also
        what is swapped out. hugetlbfs cannot tell: all of it is data there.
        """
        page = self.region.page_size
        stop = self.region.size if stop is None else stop
        offset = start - start % page
        if start >= stop:
            return
        if self.fd < 0:
            yield offset, stop + -stop % page - offset
            return
        while offset < stop:
            data = self._seek(offset, os.SEEK_DATA)
            if data is None or data >= stop:
                return
            hole = self._seek(data, os.SEEK_HOLE)
            begin = data - data % page
            end = stop if hole is None else min(hole, stop)
            # A page that somebody gave back between the two questions still counts as one page of data.
            end = max(end + -end % page, begin + page)
            yield begin, end - begin
            offset = end

    def _seek(self, offset: int, whence: int) -> int | None:
        """Return the next offset of that kind, None where there is none up to the end of the file."""
        try:
            return os.lseek(self.fd, offset, whence)
        except OSError as refused:
            if refused.errno == ENXIO:
                return None
            raise KernelError("lseek", refused.errno or ENXIO, f"offset {offset:#x}") from refused

    def forbid_huge_pages(self) -> None:
        """Keep transparent huge pages out, also where the host's setting is `always`: one page stays one page."""
        self._advise_huge_pages(allow=False)

    def allow_huge_pages(self) -> None:
        """Ask for transparent huge pages from now on, where the host's setting is `advise` or `always`."""
        self._advise_huge_pages(allow=True)

    def _advise_huge_pages(self, *, allow: bool) -> None:
        for address in (self.address, self.alias):
            if address:
                calls.advise_huge_pages(address, self.region.size, allow=allow)

    def fill_holes(self, offset: int, length: int) -> None:
        """Give the file pages of zeros where it has none, so that CONTINUE finds them; others stay as they are.

        Raises KernelError ENOSPC where huge pages or memory have run out.
        """
        calls.allocate_file(self.fd, offset, length)

    def punch_hole(self, offset: int, length: int) -> None:
        """Give pages back: they read as zeros afterwards. The kernel sends no event, so the caller must know of it."""
        calls.punch_hole(self.fd, offset, length)

    def close(self) -> None:
        """Take both mappings away and close the file; more than once is no harm. The memory goes with the last user."""
        for address in (self.address, self.alias):
            if address:
                calls.unmap(address, self.region.size)
        self.address = self.alias = 0
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
