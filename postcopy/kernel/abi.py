"""The userfaultfd ABI: numbers, flags and struct layouts, as the kernel has fixed them.

In: nothing. Out: constants. They are written down here, and not taken from the header of the machine that builds,
because Debian 12's `linux/userfaultfd.h` is that of Linux 6.1 and lacks POISON, MOVE and the feature bits 13 to 16.
Each ioctl's number is computed from its parts and asserted against the number that is known to be right.
Sources: ioctl_userfaultfd(2), userfaultfd(2), PAGEMAP_SCAN(2const) and the kernel's admin-guide/mm documents.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

_TYPE_USERFAULTFD = 0xAA
_TYPE_FILESYSTEM = ord("f")
_READ, _WRITE = 2, 1

API = 0xAA  # the only version of the ABI there has ever been
USER_MODE_ONLY = 1  # flag of userfaultfd(2), Linux 5.11

# Layouts, little or big endian as the machine is; `q` where the kernel writes bytes done or -errno.
RANGE = struct.Struct("=QQ")  # start, length
API_ARGUMENT = struct.Struct("=QQQ")  # api, features, ioctls
REGISTER_ARGUMENT = struct.Struct("=QQQQ")  # start, length, mode, ioctls
PLACE_ARGUMENT = struct.Struct("=QQQQq")  # destination, source, length, mode, done: COPY and MOVE
RANGE_ARGUMENT = struct.Struct("=QQQq")  # start, length, mode, done: CONTINUE, ZEROPAGE and POISON
PROTECT_ARGUMENT = struct.Struct("=QQQ")  # start, length, mode
SCAN_ARGUMENT = struct.Struct("=12Q")  # the fields of struct pm_scan_arg, in its order
SCAN_RANGE = struct.Struct("=QQQ")  # start, end, categories
MESSAGE_BYTES = 32


def ioc(direction: int, kind: int, number: int, size: int) -> int:
    """Compute an ioctl's number as the kernel's _IOC macro does on x86, Arm, RISC-V and s390."""
    return direction << 30 | size << 16 | kind << 8 | number


IOC_NEW = ioc(0, _TYPE_USERFAULTFD, 0x00, 0)  # on /dev/userfaultfd
IOC_API = ioc(_READ | _WRITE, _TYPE_USERFAULTFD, 0x3F, API_ARGUMENT.size)
IOC_REGISTER = ioc(_READ | _WRITE, _TYPE_USERFAULTFD, 0x00, REGISTER_ARGUMENT.size)
IOC_UNREGISTER = ioc(_READ, _TYPE_USERFAULTFD, 0x01, RANGE.size)
IOC_WAKE = ioc(_READ, _TYPE_USERFAULTFD, 0x02, RANGE.size)
IOC_COPY = ioc(_READ | _WRITE, _TYPE_USERFAULTFD, 0x03, PLACE_ARGUMENT.size)
IOC_ZEROPAGE = ioc(_READ | _WRITE, _TYPE_USERFAULTFD, 0x04, RANGE_ARGUMENT.size)
IOC_MOVE = ioc(_READ | _WRITE, _TYPE_USERFAULTFD, 0x05, PLACE_ARGUMENT.size)
IOC_WRITEPROTECT = ioc(_READ | _WRITE, _TYPE_USERFAULTFD, 0x06, PROTECT_ARGUMENT.size)
IOC_CONTINUE = ioc(_READ | _WRITE, _TYPE_USERFAULTFD, 0x07, RANGE_ARGUMENT.size)
IOC_POISON = ioc(_READ | _WRITE, _TYPE_USERFAULTFD, 0x08, RANGE_ARGUMENT.size)
IOC_PAGEMAP_SCAN = ioc(_READ | _WRITE, _TYPE_FILESYSTEM, 0x10, SCAN_ARGUMENT.size)

assert IOC_NEW == 0x0000AA00  # noqa: S101 - facts of the ABI; a wrong one must not come as far as an ioctl
assert IOC_API == 0xC018AA3F  # noqa: S101
assert IOC_REGISTER == 0xC020AA00  # noqa: S101
assert IOC_UNREGISTER == 0x8010AA01  # noqa: S101
assert IOC_WAKE == 0x8010AA02  # noqa: S101
assert IOC_COPY == 0xC028AA03  # noqa: S101
assert IOC_ZEROPAGE == 0xC020AA04  # noqa: S101
assert IOC_MOVE == 0xC028AA05  # noqa: S101
assert IOC_WRITEPROTECT == 0xC018AA06  # noqa: S101
assert IOC_CONTINUE == 0xC020AA07  # noqa: S101
assert IOC_POISON == 0xC020AA08  # noqa: S101
assert IOC_PAGEMAP_SCAN == 0xC0606610  # noqa: S101


class Feature(IntFlag):
    """What UFFDIO_API offers and is asked for, with the kernel since which it exists."""

    WP = 1 << 0  # 5.7: write-protect mode on anonymous memory
    EVENT_FORK = 1 << 1  # 4.11: needs CAP_SYS_PTRACE
    EVENT_REMAP = 1 << 2  # 4.11
    EVENT_REMOVE = 1 << 3  # 4.11
    MISSING_HUGETLB = 1 << 4  # 4.11
    MISSING_SHMEM = 1 << 5  # 4.11
    EVENT_UNMAP = 1 << 6  # 4.11
    SIGBUS = 1 << 7  # 4.14: no messages, the toucher gets SIGBUS
    THREAD_ID = 1 << 8  # 4.14
    MINOR_HUGETLB = 1 << 9  # 5.13
    MINOR_SHMEM = 1 << 10  # 5.14
    EXACT_ADDRESS = 1 << 11  # 5.18: else addresses are rounded down to the page
    WP_HUGETLB_SHMEM = 1 << 12  # 5.19
    WP_UNPOPULATED = 1 << 13  # 6.4: write-protect anonymous pages that are not there yet
    POISON = 1 << 14  # 6.6
    WP_ASYNC = 1 << 15  # 6.7: the kernel resolves write-protect faults by itself
    MOVE = 1 << 16  # 6.8
    RWP = 1 << 17  # 7.3: known so that it can be shown; nothing here depends on it
    RWP_ASYNC = 1 << 18  # 7.3


NO_FEATURES = Feature(0)


class Mode(IntFlag):
    """The `mode` of UFFDIO_REGISTER: which faults on the range become messages."""

    MISSING = 1 << 0  # 4.3: no page there
    WP = 1 << 1  # 5.7: a write to a page that was protected with UFFDIO_WRITEPROTECT
    MINOR = 1 << 2  # 5.13 hugetlb, 5.14 shmem: the file has the page, this mapping does not


class Ioctl(IntFlag):
    """The bits that UFFDIO_API and UFFDIO_REGISTER grant: 1 << number of the ioctl."""

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    RWPROTECT = 1 << 0x09
    API = 1 << 0x3F


NO_IOCTLS = Ioctl(0)


class FaultFlag(IntFlag):
    """The flags of a page fault's message. None of WP and MINOR: the page is missing."""

    WRITE = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


class EventCode(IntEnum):
    """The first byte of a message."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


# Modes of the ioctls that place, move and protect.
DONTWAKE = 1 << 0  # COPY, CONTINUE, ZEROPAGE, MOVE, POISON: leave the waiting threads asleep
PLACE_PROTECTED = 1 << 1  # COPY (5.7) and CONTINUE (6.4): the page comes write-protected
MOVE_ALLOW_HOLES = 1 << 1  # MOVE: pages that the source does not have are no error
PROTECT = 1 << 0  # WRITEPROTECT: without it the protection is taken away
PROTECT_DONTWAKE = 1 << 1  # WRITEPROTECT: only when taking it away


class ScanFlag(IntFlag):
    """Flags of PAGEMAP_SCAN (6.7)."""

    WP_MATCHING = 1 << 0  # protect what matched, in the same step
    CHECK_WPASYNC = 1 << 1  # fail with EPERM where the range is not under WP_ASYNC


class Category(IntFlag):
    """What PAGEMAP_SCAN says of a page (6.7)."""

    WPALLOWED = 1 << 0  # registered for write-protect with WP_ASYNC
    WRITTEN = 1 << 1  # written to since it was last protected
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5  # the shared page of zeros
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7
