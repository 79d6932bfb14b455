"""A snapshot's memory file, to be read and never written, and the pieces of it that are somebody's regions.

In: a path. Out: pieces that a source's pump can read, and where they hold data. The file may be anywhere; it is not
mapped, since its owner may cut it short (postcopy/pump/README.md). What lies behind its end is an error, never zeros.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from errno import ENODATA, ENXIO
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Self

from postcopy.errors import KernelError, UsageError
from postcopy.limits import MEMORY_NAME_BYTES
from postcopy.pages.regions import Region


class SnapshotFile:
    """An open file of `size` bytes. Raises UsageError where it cannot be read, or is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as refused:
            raise UsageError(f"snapshot {path}: {refused.strerror}") from refused
        found = os.fstat(self.fd)
        self.size = found.st_size
        if not stat.S_ISREG(found.st_mode) or not self.size:
            self.close()
            what = "it is empty" if stat.S_ISREG(found.st_mode) else "it is no file with bytes in it"
            raise UsageError(f"snapshot {path}: {what}")

    def name(self) -> bytes:
        """Return what tells this file, as it is now, from any other and from itself once it was written to."""
        now = os.fstat(self.fd)
        what = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
        return blake2b(repr(what).encode(), digest_size=MEMORY_NAME_BYTES).digest()

    def piece(self, region: Region, offset: int) -> SnapshotPiece:
        """Return the part of the file that begins at `offset` as a region."""
        return SnapshotPiece(region, os.dup(self.fd), offset)

    def close(self) -> None:
        """Close the file; its pieces stay."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1  # also where closing fails: the number may be another file's by then
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SnapshotPiece:
    """What a source's pump and its push need of a region: `address` and `alias` are 0, for nothing is mapped."""

    address = 0
    alias = 0

    def __init__(self, region: Region, fd: int, offset: int) -> None:
        self.region = region
        self.fd = fd
        self.fd_offset = offset

    def data_extents(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what may hold data, ascending, in whole pages of the region.

        Raises KernelError where the file has become shorter: what it no longer has would look like a hole.
        """
        page, stop, offset = self.region.page_size, self.region.size, 0
        while offset < stop:
            data = self._seek(offset, os.SEEK_DATA)
            if data is None or data >= stop:
                break
            hole = self._seek(data, os.SEEK_HOLE)
            begin = data - data % page
            end = min(stop, hole if hole is not None else data + page)
            end = max(end + -end % page, begin + page)
            yield begin, end - begin
            offset = end
        if os.fstat(self.fd).st_size < self.fd_offset + stop:
            raise KernelError("reading the snapshot", ENODATA, "its file has become shorter")

    def _seek(self, offset: int, whence: int) -> int | None:
        """Return the next offset of that kind, None where there is none up to the end of the file."""
        try:
            return os.lseek(self.fd, self.fd_offset + offset, whence) - self.fd_offset
        except OSError as refused:
            if refused.errno == ENXIO:
                return None
            raise KernelError("lseek", refused.errno or ENXIO, f"offset {offset:#x}") from refused

    def close(self) -> None:
        """Close the file; more than once is no harm."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1  # also where closing fails: the number may be another file's by then
            os.close(fd)
