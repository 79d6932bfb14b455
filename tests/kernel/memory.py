"""Memory of each kind for tests: mapped, and registered with a userfaultfd of all features."""

from __future__ import annotations

from postcopy.kernel import Feature, Mode, Userfaultfd, calls, memory_type
from postcopy.pages.regions import Region

KINDS = ["anonymous", "shmem", "hugetlb-2M"]
SHARED = ["shmem", "hugetlb-2M"]
# Events would make every change of a mapping wait for its reader.
PLAIN = ~(Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.SIGBUS) & ~(
    Feature.WP_ASYNC | Feature.EXACT_ADDRESS
)


def page_size(kind):
    return memory_type(kind).page_size


def allocate(kind, pages=1, alias=True):
    size = pages * page_size(kind)
    return memory_type(kind).allocate(Region(0, kind, page_size(kind), size), alias=alias)


def registered(kind, modes=Mode.MISSING, pages=1, features=PLAIN):
    """Return (uffd, mapping) with all of the mapping registered for `modes`."""
    mapping = allocate(kind, pages)
    uffd = Userfaultfd.open(optional=features)
    uffd.register(mapping.address, mapping.region.size, modes)
    return uffd, mapping


def fill(mapping, page, byte):
    """Write a page through the alias, where no fault is told."""
    size = mapping.region.page_size
    calls.write_memory(mapping.alias + page * size, byte * size)
