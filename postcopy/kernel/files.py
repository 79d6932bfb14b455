"""Guest memory that is a file of a mounted tmpfs or hugetlbfs.

In: a path. Out: the memory type of the filesystem it lies on, bound to that place. A directory holds files without a
name, which end with their last user; any other path is the name of a file that is made, and goes with its mapping. To
the guest such memory is what a memfd of the same page size is, and that is what a type without a place allocates.
"""

from __future__ import annotations

import contextlib
import os
from errno import EINVAL
from pathlib import Path

from postcopy.errors import HostError, KernelError, UsageError
from postcopy.kernel.hugetlb import Hugetlb
from postcopy.kernel.memory_type import MemoryType, describe_size
from postcopy.kernel.shmem import Shmem, require_room

MOUNTS = Path("/proc/self/mountinfo")
HUGETLBFS = {1 << 21: "hugetlbfs-2M", 1 << 30: "hugetlbfs-1G"}


class Tmpfs(Shmem):
    """A file of a tmpfs; trapped and placed as shmem, which it is."""

    name = "tmpfs"

    def __init__(self, place: Path | None = None) -> None:
        self.place = place
        self.file_name = _name_of(place)

    def create_file(self, label: str, size: int) -> int:
        """Return a file in the type's place, a memfd where it has none."""
        if self.place is None:
            return super().create_file(label, size)
        return create_in(self.place, size, named=self.file_name is not None)

    def check_room(self, size: int) -> None:
        """Compare with memory, and with the mount's own limit."""
        require_room(self.name, size, *_mount_room(self.place))


class Hugetlbfs(Hugetlb):
    """A file of a hugetlbfs mounted with one page size; trapped and placed as hugetlb, which it is."""

    def __init__(self, name: str, page_size: int, place: Path | None = None) -> None:
        super().__init__(name, page_size)
        self.place = place
        self.file_name = _name_of(place)

    def create_file(self, label: str, size: int) -> int:
        """Return a file in the type's place, a memfd of the same pages where it has none."""
        if self.place is None:
            return super().create_file(label, size)
        return create_in(self.place, size, named=self.file_name is not None)

    def check_room(self, size: int) -> None:
        """Compare with the pool, and with the mount's own limit."""
        super().check_room(size)
        for left, limit in _mount_room(self.place):
            if size > left:
                raise HostError(
                    f"{describe_size(size)} of {self.name} asked for, {describe_size(left)} left in {limit}"
                )


def check_name(place: Path) -> None:
    """Raise UsageError where no file can have that name: it is too long, or lies where this user may not look."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            place.stat()
    except OSError as refused:
        raise UsageError(f"{place}: {refused.strerror}") from refused


def type_at(place: Path) -> MemoryType:
    """Return the memory type of the files that lie there; UsageError where these are no memory, or there is no such."""
    check_name(place)
    folder = _folder_of(place)
    if not place.is_absolute() or not folder.is_dir():
        raise UsageError(f"{place}: no directory to put guest memory in, or in which to make that file")
    kind = _filesystem(folder)
    if kind == "tmpfs":
        return Tmpfs(place)
    page_size = os.statvfs(folder).f_bsize
    if kind == "hugetlbfs" and page_size in HUGETLBFS:
        return Hugetlbfs(HUGETLBFS[page_size], page_size, place)
    raise UsageError(f"{place} lies on {kind}: guest memory is kept in files of tmpfs or hugetlbfs only")


def create_in(place: Path, size: int, *, named: bool) -> int:
    """Return the descriptor of a new file of `size` bytes there, all of it a hole; KernelError if not.

    `named`: the place is the file's name, not a directory for it. It is not asked again, since it may have changed: a
    directory that has gone is refused, and no file of its name is made, which nobody would remove.
    A name that is taken is refused (EEXIST): what lies there may be another guest's memory.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if named else os.O_TMPFILE)
    try:
        fd = os.open(place, flags, 0o600)
    except OSError as refused:
        raise KernelError(f"open {place}", refused.errno or EINVAL) from refused
    try:
        os.ftruncate(fd, size)
    except OSError as refused:
        os.close(fd)
        if named:
            place.unlink()
        raise KernelError(f"ftruncate of {place}", refused.errno or EINVAL, f"{size} bytes") from refused
    return fd


def _folder_of(place: Path) -> Path:
    return place if place.is_dir() else place.parent


def _name_of(place: Path | None) -> Path | None:
    return None if place is None or place.is_dir() else place


def _filesystem(folder: Path) -> str:
    """Return the kind of filesystem that a directory lies on, by the number of its device."""
    number = folder.stat().st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for line in MOUNTS.read_text(encoding="utf-8").splitlines():
        mount, _, filesystem = line.partition(" - ")
        if mount.split()[2] == wanted:
            return filesystem.split()[0]
    return "an unknown filesystem"


def _mount_room(place: Path | None) -> list[tuple[int, str]]:
    """Return how many bytes a mount with a limit of its own has left, and its name; nothing where it has none."""
    if place is None:
        return []
    folder = _folder_of(place)
    try:
        found = os.statvfs(folder)
    except OSError as refused:
        raise HostError(f"{folder}: {refused.strerror}") from refused
    return [(found.f_bavail * found.f_frsize, str(folder))] if found.f_blocks else []
