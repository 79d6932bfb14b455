"""Huge pages of a fixed size, from the pool that the administrator set aside (hugetlbfs)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from postcopy.errors import HostError
from postcopy.kernel.abi import Feature, Ioctl, Mode
from postcopy.kernel.memory_type import MemoryType, Way, describe_size
from postcopy.kernel.shmem import create_memfd
from postcopy.limits import TRIED_BYTES_MAX

POOLS = Path("/sys/kernel/mm/hugepages")
_SIZE_SHIFT = 26  # memfd_create's flags carry the binary logarithm of the page size from this bit on


@dataclass(frozen=True, slots=True)
class Pool:
    """Huge pages of one size: how many there are, are not used, and of these are promised to mappings already.

    `more` is how many the kernel may still make beyond the pool when asked (overcommit); it can fail to.
    """

    total: int
    free: int
    reserved: int
    more: int

    @property
    def unclaimed(self) -> int:
        """Pages that nobody uses or was promised."""
        return max(self.free - self.reserved, 0)


class Hugetlb(MemoryType):
    """hugetlb of one page size: missing since 4.11, minor 5.13, write-protect 5.19."""

    alias = True
    modes = Mode.MISSING | Mode.MINOR | Mode.WP
    features = {  # noqa: RUF012 - never changed
        Mode.MISSING: Feature.MISSING_HUGETLB,
        Mode.MINOR: Feature.MINOR_HUGETLB,
        Mode.WP: Feature.WP | Feature.WP_HUGETLB_SHMEM,
    }
    ways = {  # noqa: RUF012 - never changed
        Way.COPY: Ioctl.COPY,
        Way.CONTINUE: Ioctl.CONTINUE,
    }

    def __init__(self, name: str, page_size: int) -> None:
        self.name = name
        self.page_size = page_size
        self.pool_folder = POOLS / f"hugepages-{page_size // 1024}kB"

    @property
    def spare(self) -> bool:
        """Whether the pool has a page to spare; one that takes long to clear is not worth it."""
        try:
            return self.page_size <= TRIED_BYTES_MAX and self.pool().unclaimed > 0
        except HostError:
            return False

    def pool(self) -> Pool:
        """Read the pool's counters; HostError where this machine has no huge pages of that size."""
        try:
            counts = {
                name: int((self.pool_folder / f"{name}_hugepages").read_text(encoding="utf-8"))
                for name in ("nr", "free", "resv", "nr_overcommit", "surplus")
            }
        except OSError as missing:
            raise HostError(
                f"{self.name}: this machine has no huge pages of {describe_size(self.page_size)}"
            ) from missing
        more = max(counts["nr_overcommit"] - counts["surplus"], 0)
        return Pool(total=counts["nr"], free=counts["free"], reserved=counts["resv"], more=more)

    def create_file(self, label: str, size: int) -> int:
        """Return a memfd of huge pages; none is taken from the pool before it is mapped."""
        encoded = (self.page_size.bit_length() - 1) << _SIZE_SHIFT
        return create_memfd(label, size, os.MFD_CLOEXEC | os.MFD_HUGETLB | encoded)

    def check_room(self, size: int) -> None:
        """Compare with the pages of the pool that nobody has and nobody was promised."""
        needed = -(-size // self.page_size)
        pool = self.pool()
        lacking = needed - pool.unclaimed
        if lacking > pool.more:
            raise HostError(
                f"{self.name}: {needed} huge pages asked for, {pool.unclaimed} of {pool.total} unclaimed in "
                f"{self.pool_folder}: echo {pool.total + lacking} > {self.pool_folder / 'nr_hugepages'}"
            )

    def zero_way(self, *, alias: bool) -> Way:
        """CONTINUE of a fresh page where the file can be filled behind the guest's back, else COPY of zeros."""
        return Way.CONTINUE if alias else Way.COPY
