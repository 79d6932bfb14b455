"""Shared memory of 4 KiB pages, without a name (memfd_create)."""

from __future__ import annotations

import fcntl
import mmap
import os
from errno import EINVAL
from pathlib import Path

from postcopy.errors import HostError, KernelError
from postcopy.kernel.abi import Feature, Ioctl, Mode
from postcopy.kernel.cgroups import memory_left
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.memory_type import MemoryType, Way, describe_size

MEMINFO = Path("/proc/meminfo")


class Shmem(MemoryType):
    """shmem: missing since 4.11, minor 5.14, write-protect 5.19."""

    name = "shmem"
    page_size = mmap.PAGESIZE
    alias = True
    thin = True
    modes = Mode.MISSING | Mode.MINOR | Mode.WP
    features = {  # noqa: RUF012 - never changed
        Mode.MISSING: Feature.MISSING_SHMEM,
        Mode.MINOR: Feature.MINOR_SHMEM,
        Mode.WP: Feature.WP | Feature.WP_HUGETLB_SHMEM,
    }
    ways = {  # noqa: RUF012 - never changed
        Way.COPY: Ioctl.COPY,
        Way.CONTINUE: Ioctl.CONTINUE,
        Way.ZEROPAGE: Ioctl.ZEROPAGE,
    }

    def create_file(self, label: str, size: int) -> int:
        """Return a memfd that may not shrink or grow."""
        return create_memfd(label, size, os.MFD_CLOEXEC)

    def check_room(self, size: int) -> None:
        """Compare with what the kernel says is available, and with what this process's cgroup has left."""
        require_room(self.name, size)

    def zero_way(self, *, alias: bool) -> Way:  # noqa: ARG002 - the same either way
        """ZEROPAGE: it needs no alias and refuses a page that is there."""
        return Way.ZEROPAGE

    def prepare(self, mapping: Mapping) -> None:
        """Keep huge pages out where there is an alias, that is: at a destination.

        Under `shmem_enabled=always` a first write of 4 KiB through the alias would give the file 2 MiB at once. Its
        neighbours would be zeros that are there before their content came: COPY and ZEROPAGE would find them PRESENT.
        Once all has been placed, Mapping.allow_huge_pages() undoes it.
        """
        if mapping.alias:
            mapping.forbid_huge_pages()


def create_memfd(label: str, size: int, flags: int) -> int:
    """Return the descriptor of a new memfd of `size` bytes, sealed against a change of size; KernelError if not.

    The seal keeps whoever is handed the descriptor from cutting the file short, which would be a SIGBUS for the guest.
    """
    try:
        fd = os.memfd_create(label, flags | os.MFD_ALLOW_SEALING)
    except OSError as refused:
        raise KernelError("memfd_create", refused.errno or EINVAL) from refused
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as refused:
        os.close(fd)
        raise KernelError("memfd of guest memory", refused.errno or EINVAL, f"{size} bytes") from refused
    return fd


def require_room(name: str, size: int, *more: tuple[int, str]) -> None:
    """Raise HostError where `size` bytes of ordinary memory, or of what is limited by `more`, are not to be had."""
    available, limit = min([room(), *more])
    if size > available:
        raise HostError(
            f"{describe_size(size)} of {name} asked for, {describe_size(available)} available by {limit}: "
            "free memory or raise that limit"
        )


def room() -> tuple[int, str]:
    """Return how many bytes of memory may still be used, and by which limit."""
    limits = [(_meminfo("MemAvailable") + _meminfo("SwapFree"), "MemAvailable and SwapFree"), *memory_left()]
    return min(limits)


def _meminfo(field: str) -> int:
    for line in MEMINFO.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0
