"""Mapping: one region's memory in this process.

In: a region and the file behind its memory. Out: the address the guest uses, the address of the alias through which
bytes are received in place, and which parts of the file hold data.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from errno import ENXIO
from pathlib import Path
from types import TracebackType
from typing import Self

from postcopy.errors import HostError, KernelError
from postcopy.kernel import calls
from postcopy.kernel.abi import Category
from postcopy.kernel.pagemap import Filter, Pagemap
from postcopy.pages.regions import Region

# What stat(2) counts, whatever the filesystem's own blocks are.
_BLOCK = 512
# Pages with content of their own: there or swapped out, and not the zero page that a read of nothing maps.
_POPULATED = Filter(
    every=Category.PFNZERO,
    inverted=Category.PFNZERO,
    some=Category.PRESENT | Category.SWAPPED,
    report=Category.PFNZERO,
)


class Mapping:
    """A region's memory: `address` is the guest's mapping, `alias` a second one that is never registered (0: none).

    `fd` is the file behind both (-1: none, the memory is private and anonymous), in which the region begins at
    `fd_offset`. It belongs to the mapping from the moment its constructor is entered, whatever comes of it, and so does
    its name if it has one. Neither mapping goes into core dumps: it is the guest's memory, and as large as that. Raises
    HostError where the kernel will not map it.
    """

    def __init__(
        self, region: Region, fd: int, *, alias: bool, reserve: bool = True, file_name: Path | None = None
    ) -> None:
        self.region = region
        self.address = 0
        self.alias = 0
        self.fd = fd
        self.fd_offset = 0
        self._file_name = file_name
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

    def read(self, offset: int, length: int) -> bytes:
        """Copy bytes out of the guest's mapping, as a guest would; waits for a missing page with the GIL given up."""
        return calls.read_memory(self._inside(offset, length), length)

    def write(self, offset: int, content: bytes) -> None:
        """Copy bytes into the guest's mapping; waits as read() does."""
        calls.write_memory(self._inside(offset, len(content)), content)

    def _inside(self, offset: int, length: int) -> int:
        """Return the address of bytes that are all in the region; ValueError where they are not, or it is closed."""
        if not self.address or not (offset >= 0 and 0 <= length <= self.region.size - offset):
            raise ValueError(
                f"{length} bytes at offset {offset:#x} are not in {self.region.size} bytes that are mapped"
            )
        return self.address + offset

    def data_extents(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what may hold data from `start` up to `stop`, ascending, in whole pages.

        What lies between reads as zeros. Asks the file (SEEK_DATA, SEEK_HOLE), so it sees what anybody wrote, also
        what is swapped out. hugetlbfs cannot tell: all of it is data there. Memory without a file is looked up in this
        process's page tables; where the kernel cannot do that (before 6.7) all of it is data.
        """
        page = self.region.page_size
        stop = self.region.size if stop is None else stop
        offset = start - start % page
        if start >= stop:
            return
        if self.fd < 0:
            yield from self._populated(offset, min(stop + -stop % page, self.region.size))
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

    @property
    def allocated(self) -> int:
        """Bytes of the file that are there, in memory or swapped out; all of the region where there is no file."""
        return self.region.size if self.fd < 0 else min(self.region.size, os.fstat(self.fd).st_blocks * _BLOCK)

    def _populated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of the pages that were written, by asking the page tables and not the memory."""
        try:
            with Pagemap() as pagemap:
                found = pagemap.scan(self.address + start, self.address + stop, _POPULATED)
        except KernelError:
            yield start, stop - start  # a migration must not fail for want of a hint
            return
        for run in found:
            yield run.start - self.address, run.stop - run.start

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
        """Give pages back: they read as zeros afterwards. The kernel sends no event, so the caller must know of it.

        Memory without a file is given back by MADV_DONTNEED, which does send one. Raises ValueError for anything but
        whole pages of the region: the kernel would zero parts of pages, and go on behind the region.
        """
        size, page = self.region.size, self.region.page_size
        if offset % page or length % page or not (offset >= 0 and 0 < length <= size - offset):
            raise ValueError(f"{length} bytes at offset {offset:#x} are no whole pages ({page} bytes) of {size} bytes")
        if self.fd < 0:
            calls.advise(self.address + offset, length, calls.MADV_DONTNEED)
        else:
            calls.punch_hole(self.fd, offset, length)

    def close(self) -> None:
        """Take both mappings away and close the file; more than once is no harm. The memory goes with the last user."""
        for address in (self.address, self.alias):
            if address:
                calls.unmap(address, self.region.size)
        self.address = self.alias = 0
        if self.fd >= 0:
            fd, self.fd = self.fd, -1  # also where closing fails: the number may be another file's by then
            if self._file_name is not None:
                with contextlib.suppress(OSError):
                    # Somebody may have put another file there meanwhile: that one is theirs.
                    if os.path.samestat(os.fstat(fd), self._file_name.lstat()):
                        self._file_name.unlink()
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
