"""The memory types there are, by the names users type. A new one is one file, and one line here."""

from __future__ import annotations

from postcopy.errors import UsageError
from postcopy.kernel.hugetlb import Hugetlb
from postcopy.kernel.memory_type import MemoryType
from postcopy.kernel.shmem import Shmem

MEMORY_TYPES: dict[str, MemoryType] = {
    known.name: known
    for known in (
        Shmem(),
        Hugetlb("hugetlb-2M", 1 << 21),
        Hugetlb("hugetlb-1G", 1 << 30),
    )
}


def memory_type(name: str) -> MemoryType:
    """Return the memory type of that name; UsageError that lists the known ones."""
    try:
        return MEMORY_TYPES[name]
    except KeyError:
        raise UsageError(f"unknown memory type {name!r}: known are {', '.join(MEMORY_TYPES)}") from None
