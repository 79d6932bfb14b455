"""System calls on addresses, as plain functions: numbers in, numbers out, KernelError where the kernel refuses.

Addresses, offsets and lengths are bytes. Every call gives the GIL up while it runs.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from errno import EINVAL
from typing import Any

from postcopy.errors import KernelError
from postcopy.kernel._kernel import ffi, lib

MADV_DONTNEED: int = lib.MADV_DONTNEED
MADV_REMOVE: int = lib.MADV_REMOVE
MADV_DONTDUMP: int = lib.MADV_DONTDUMP
MADV_HUGEPAGE: int = lib.MADV_HUGEPAGE
MADV_NOHUGEPAGE: int = lib.MADV_NOHUGEPAGE

_MAP_FAILED = ffi.cast("void *", -1)


def _pointer(address: int) -> Any:
    return ffi.cast("void *", address)


def new_userfaultfd(flags: int) -> int:
    """Make a new userfaultfd by system call and return the descriptor."""
    descriptor = int(lib.system_userfaultfd(flags))
    if descriptor < 0:
        raise KernelError("userfaultfd(2)", int(ffi.errno))
    return descriptor


def ioctl(descriptor: int, request: int, argument: bytearray) -> int:
    """Perform an ioctl on `argument`, which the kernel may change, also where it fails: result, or -errno."""
    return int(lib.system_ioctl(descriptor, request, ffi.from_buffer(argument, require_writable=True)))


def ioctl_value(descriptor: int, request: int, value: int) -> int:
    """Perform an ioctl whose argument is a number: result, or -errno."""
    return int(lib.system_ioctl(descriptor, request, _pointer(value)))


@contextlib.contextmanager
def pinned(buffer: bytes | bytearray | memoryview) -> Iterator[int]:
    """Give the address of `buffer`'s first byte; inside the `with` the buffer can be neither resized nor freed."""
    with ffi.from_buffer(buffer) as held:
        yield int(ffi.cast("uintptr_t", held))


def map_shared(descriptor: int, length: int, offset: int = 0, *, reserve: bool = True) -> int:
    """Map `length` bytes of a file, shared, for reading and writing; return the address.

    Without `reserve` huge pages are not set aside for it: touching it may then raise SIGBUS.
    """
    return _map(length, mmap.MAP_SHARED | (0 if reserve else lib.MAP_NORESERVE), descriptor, offset)


def map_anonymous(length: int) -> int:
    """Map `length` bytes of private anonymous memory for reading and writing; return the address."""
    return _map(length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)


def _map(length: int, flags: int, descriptor: int, offset: int) -> int:
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = lib.mmap(ffi.NULL, length, protection, flags, descriptor, offset)
    if address == _MAP_FAILED:
        raise KernelError("mmap", int(ffi.errno), f"{length} bytes")
    return int(ffi.cast("uintptr_t", address))


def unmap(address: int, length: int) -> None:
    """Take a mapping away."""
    if lib.munmap(_pointer(address), length):
        raise KernelError("munmap", int(ffi.errno), f"{length} bytes at {address:#x}")


def remap(address: int, length: int, *, to: int) -> None:
    """Move the pages of a mapping to `to`, in place of whatever is mapped there."""
    flags = lib.MREMAP_MAYMOVE | lib.MREMAP_FIXED
    if lib.mremap(_pointer(address), length, length, flags, _pointer(to)) == _MAP_FAILED:
        raise KernelError("mremap", int(ffi.errno), f"{length} bytes at {address:#x}")


def advise(address: int, length: int, advice: int) -> None:
    """Call madvise(2) with one of the MADV constants of this module."""
    if lib.madvise(_pointer(address), length, advice):
        raise KernelError("madvise", int(ffi.errno), f"advice {advice}, {length} bytes at {address:#x}")


def advise_huge_pages(address: int, length: int, *, allow: bool) -> None:
    """Ask for transparent huge pages there, or forbid them; nothing happens where the kernel was built without."""
    try:
        advise(address, length, MADV_HUGEPAGE if allow else MADV_NOHUGEPAGE)
    except KernelError as refused:
        if refused.number != EINVAL:
            raise


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Free the file's pages there; they read as zeros afterwards. No userfaultfd event tells of it."""
    mode = lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE
    if lib.fallocate(descriptor, mode, offset, length):
        raise KernelError("fallocate(PUNCH_HOLE)", int(ffi.errno), f"{length} bytes at offset {offset:#x}")


def allocate_file(descriptor: int, offset: int, length: int) -> None:
    """Give the file pages of zeros where it has holes; pages that are there stay as they are."""
    if lib.fallocate(descriptor, 0, offset, length):
        raise KernelError("fallocate", int(ffi.errno), f"{length} bytes at offset {offset:#x}")


def read_memory(address: int, length: int) -> bytes:
    """Copy bytes out of this process's memory; waits in page faults with the GIL given up."""
    content = bytearray(length)
    lib.memcpy(ffi.from_buffer(content, require_writable=True), _pointer(address), length)
    return bytes(content)


def write_memory(address: int, content: bytes) -> None:
    """Copy bytes into this process's memory; waits in page faults with the GIL given up."""
    lib.memcpy(_pointer(address), ffi.from_buffer(content), len(content))
