"""The pool of 2 MiB huge pages: how many are free, and more of them for as long as a bench runs.

The kernel's counters enter. While the block of `reserved` lasts so many pages are free; then the pool is as large as
it was before. A bench that is killed leaves it as it is: the kernel keeps no account of who reserved what.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from postcopy.errors import HostError
from postcopy.kernel.hugetlb import Hugetlb

HUGE_POOL = Hugetlb("hugetlb-2M", 2 << 20)


def free_pages(huge: Hugetlb = HUGE_POOL) -> int:
    """Return how many huge pages are there for the taking."""
    try:
        return huge.pool().unclaimed
    except HostError:
        return 0


@contextmanager
def reserved(count: int, huge: Hugetlb = HUGE_POOL) -> Iterator[None]:
    """Make sure that `count` huge pages are free while the block lasts; HostError where the kernel has not got them."""
    wanted = max(0, count - huge.pool().unclaimed)
    given = _grow(huge, wanted) if wanted else 0
    try:
        if given < wanted:
            raise HostError(f"{huge.name}: {wanted} more huge pages were asked for, the kernel found {given}")
        yield
    finally:
        if given:
            _grow(huge, -given)


def _grow(huge: Hugetlb, by: int) -> int:
    """Ask the kernel for so many more pages in the pool; return how many more there are."""
    before = huge.pool().total
    try:
        (huge.pool_folder / "nr_hugepages").write_text(str(before + by))
    except OSError as refused:
        raise HostError(f"{huge.name}: the pool cannot be changed: {refused}") from refused
    return huge.pool().total - before
