"""Messages: each kind from its bytes."""

import struct

import pytest

from postcopy.errors import KernelError
from postcopy.kernel.abi import FaultFlag
from postcopy.kernel.events import Fork, PageFault, Remap, Remove, Unmap, parse


def message(code, *words):
    return struct.pack("=B7x3Q", code, *words)


def test_each_kind_is_read_from_its_fields():
    # The thread id is 32 bits wide; what lies behind it is no part of it.
    content = (
        message(0x12, 5, 0x7F0000001000, 0xDEAD00000000 | 4711)
        + message(0x13, 9, 0, 0)
        + message(0x14, 0x1000, 0x9000, 0x2000)
        + message(0x15, 0x1000, 0x3000, 0)
        + message(0x16, 0x5000, 0x6000, 0)
    )
    assert parse(content) == [
        PageFault(0x7F0000001000, FaultFlag.WRITE | FaultFlag.MINOR, 4711),
        Fork(9),
        Remap(0x1000, 0x9000, 0x2000),
        Remove(0x1000, 0x3000),
        Unmap(0x5000, 0x6000),
    ]


@pytest.mark.parametrize(
    ("flags", "missing"),
    [(FaultFlag(0), True), (FaultFlag.WRITE, True), (FaultFlag.MINOR, False), (FaultFlag.WP | FaultFlag.WRITE, False)],
)
def test_a_fault_is_missing_unless_it_is_minor_or_protected(flags, missing):
    assert PageFault(0, flags, 0).missing is missing


@pytest.mark.parametrize("size", [1, 31, 33])
def test_a_part_of_a_message_is_an_error(size):
    with pytest.raises(KernelError, match=f"EPROTO.*{size} bytes are no whole messages"):
        parse(bytes([0x12]) + bytes(size - 1) if size < 32 else message(0x12, 0, 0, 0) + bytes(size - 32))


def test_an_unknown_event_is_an_error():
    with pytest.raises(KernelError, match="unknown event 0x17"):
        parse(message(0x17, 0, 0, 0))
