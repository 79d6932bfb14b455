"""Private memory without a file (mmap MAP_ANONYMOUS), of small pages or transparent huge ones."""

from __future__ import annotations

import mmap

from postcopy.kernel.abi import Feature, Ioctl, Mode
from postcopy.kernel.memory_type import MemoryType, Way
from postcopy.kernel.shmem import require_room


class Anonymous(MemoryType):
    """anonymous: missing since 4.3, write-protect 5.7, never minor; MOVE 6.8.

    Only this process can reach it, so there is no alias. As long as a range is registered the kernel puts no huge page
    over a page of it that is missing: what is trapped is always a small page.
    """

    name = "anonymous"
    page_size = mmap.PAGESIZE
    alias = False
    modes = Mode.MISSING | Mode.WP
    features = {Mode.WP: Feature.WP}  # noqa: RUF012 - never changed
    ways = {  # noqa: RUF012 - never changed
        Way.COPY: Ioctl.COPY,
        Way.MOVE: Ioctl.MOVE,
        Way.ZEROPAGE: Ioctl.ZEROPAGE,
    }

    def create_file(self, label: str, size: int) -> int:  # noqa: ARG002 - there is none
        """Return -1: there is no file."""
        return -1

    def check_room(self, size: int) -> None:
        """Compare with what the kernel says is available, and with what this process's cgroup has left."""
        require_room(self.name, size)

    def zero_way(self, *, alias: bool) -> Way:  # noqa: ARG002 - there is none
        """ZEROPAGE: the kernel's one page of zeros, until it is written to."""
        return Way.ZEROPAGE
