"""The memory types there are, by the names users type. A new one is one file, and one line here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from postcopy.errors import UsageError
from postcopy.kernel.anonymous import Anonymous
from postcopy.kernel.files import HUGETLBFS, Hugetlbfs, Tmpfs, check_name, type_at
from postcopy.kernel.guest_memfd import GuestMemfd
from postcopy.kernel.hugetlb import Hugetlb
from postcopy.kernel.memory_type import MemoryType
from postcopy.kernel.shmem import Shmem

MEMORY_TYPES: dict[str, MemoryType] = {
    known.name: known
    for known in (
        Shmem(),
        Hugetlb("hugetlb-2M", 1 << 21),
        Hugetlb("hugetlb-1G", 1 << 30),
        Anonymous(),
        Tmpfs(),
        *(Hugetlbfs(name, page_size) for page_size, name in HUGETLBFS.items()),
        GuestMemfd(),
    )
}


def memory_type(name: str) -> MemoryType:
    """Return the memory type of that name; UsageError that lists the known ones."""
    try:
        return MEMORY_TYPES[name]
    except KeyError:
        raise UsageError(f"unknown memory type {name!r}: known are {', '.join(MEMORY_TYPES)}") from None


def memory_type_at(name: str, place: Path | None) -> MemoryType:
    """Return the type that a guest's owner asks for: "tmpfs" and "hugetlbfs" with a place, others without.

    "hugetlbfs" has the page size of the mount. UsageError where name and place do not go together.
    """
    kind = name.partition("-")[0]
    if kind not in {"tmpfs", "hugetlbfs"}:
        if place is not None:
            raise UsageError(f"memory {name} has no place in the file system: {place}")
        return memory_type(name)
    if place is None:
        raise UsageError(f"memory {name} needs a place: a directory, or a file to be made, like {name}:/dev/shm")
    found = type_at(place)
    if name not in {found.name, found.name.partition("-")[0]}:
        raise UsageError(f"{place} holds memory of type {found.name}, not {name}")
    return found


def memory_types_in(folders: Iterable[Path]) -> dict[str, MemoryType]:
    """Return all types by name, with those of these mounts put there; UsageError where a mount holds no memory."""
    found = dict(MEMORY_TYPES)
    for folder in folders:
        check_name(folder)
        if not folder.is_dir():
            raise UsageError(f"{folder} is no directory")
        kind = type_at(folder)
        found[kind.name] = kind
    return found
