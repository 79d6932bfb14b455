"""Messages: what a userfaultfd tells its reader.

In: the bytes of read(2), a multiple of 32. Out: one typed value for each message. Sources: userfaultfd(2).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from errno import EPROTO

from postcopy.errors import KernelError
from postcopy.kernel.abi import MESSAGE_BYTES, EventCode, FaultFlag

_HEAD = struct.Struct("=B7x3Q")  # event, then three words whose meaning is the event's
_THREAD_MASK = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread waits for the page at `address`.

    The address is the page's first byte, or the very byte touched under Feature.EXACT_ADDRESS. `thread` is the
    toucher's id under Feature.THREAD_ID, else 0; it is a number of the reader's pid namespace.
    """

    address: int
    flags: FaultFlag
    thread: int

    @property
    def missing(self) -> bool:
        """There is no page at all: neither write-protected nor minor."""
        return not self.flags & (FaultFlag.WP | FaultFlag.MINOR)


@dataclass(frozen=True, slots=True)
class Fork:
    """The process forked. `descriptor` is the child's userfaultfd; it belongs to whoever read the message.

    The fork waits until this has been read. Python's os.fork() keeps the GIL meanwhile: the reader must be another
    process, or no Python thread.
    """

    descriptor: int


@dataclass(frozen=True, slots=True)
class Remap:
    """`length` bytes moved from address `start` to `to`: faults there are told with their new addresses."""

    start: int
    to: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """The pages from `start` up to `stop` were given back (MADV_DONTNEED, MADV_REMOVE): they read as zeros now."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """The range from `start` up to `stop` is mapped no more."""

    start: int
    stop: int


Message = PageFault | Fork | Remap | Remove | Unmap


def parse(messages: bytes | bytearray | memoryview) -> list[Message]:
    """Return the messages in the order in which the kernel gave them.

    Raises KernelError EPROTO for an event this ABI does not know, which no kernel sends unless it was asked to, and for
    a part of a message, which no userfaultfd sends.
    """
    if len(messages) % MESSAGE_BYTES:
        raise KernelError("read of a userfaultfd", EPROTO, f"{len(messages)} bytes are no whole messages")
    return [_parse_one(messages, offset) for offset in range(0, len(messages), MESSAGE_BYTES)]


def _parse_one(messages: bytes | bytearray | memoryview, offset: int) -> Message:
    code, first, second, third = _HEAD.unpack_from(messages, offset)
    if code == EventCode.PAGEFAULT:
        return PageFault(second, FaultFlag(first), third & _THREAD_MASK)
    if code == EventCode.FORK:
        return Fork(first & _THREAD_MASK)
    if code == EventCode.REMAP:
        return Remap(first, second, third)
    if code == EventCode.REMOVE:
        return Remove(first, second)
    if code == EventCode.UNMAP:
        return Unmap(first, second)
    raise KernelError("read of a userfaultfd", EPROTO, f"unknown event {code:#x}")
