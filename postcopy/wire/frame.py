"""The frames of a data connection: a header of 24 bytes, and a payload behind PAGES.

What enters: headers as they arrive. What leaves: headers that name whole pages inside a known region and
keep the limits, or one reason to close the connection. The C parser of the pump does the same checks in the
same order with the same numbers; this module is what it is compared with.
"""

from __future__ import annotations

import struct
from enum import Enum, IntEnum
from typing import NamedTuple

from postcopy.errors import ProtocolError
from postcopy.limits import FRAME_BYTES_MAX
from postcopy.pages.regions import Layout, Region

FRAME_MAGIC = 0x5043  # the bytes 43 50, "CP"
HEADER = struct.Struct("<HBBHHQQ")
HEADER_BYTES = HEADER.size
_U64_MAX = (1 << 64) - 1


class FrameType(IntEnum):
    """What a frame says. Zero means nothing, so that a forgotten header is refused."""

    INVALID = 0
    REQUEST = 1
    PAGES = 2
    ZERO = 3
    END = 4
    BEAT = 5


class FrameRefusal(IntEnum):
    """Why a header is refused; the same numbers as in C."""

    OK = 0
    MAGIC = 1
    TYPE = 2
    REGION = 3
    ALIGNMENT = 4
    RANGE = 5
    LIMIT = 6
    RESERVED = 7


class Direction(Enum):
    """Where frames are read, each with the types that may arrive there."""

    TO_SOURCE = frozenset({FrameType.REQUEST, FrameType.BEAT})
    URGENT = frozenset({FrameType.PAGES, FrameType.ZERO, FrameType.BEAT})
    PUSH = frozenset({FrameType.PAGES, FrameType.ZERO, FrameType.END, FrameType.BEAT})
    PUSH_TO_SOURCE = frozenset({FrameType.BEAT})

    @property
    def allowed(self) -> int:
        """Return the types as a set of bits, `1 << type`, as the C parser takes them."""
        return sum(1 << kind for kind in self.value)


class Header(NamedTuple):
    """The header of one frame: `offset` and `length` in bytes of region number `region`.

    `type` is a plain number, for a header may arrive with any; `flags` and `reserved` are zero in these
    versions.
    """

    type: int
    region: int
    offset: int
    length: int
    magic: int = FRAME_MAGIC
    flags: int = 0
    reserved: int = 0

    @property
    def payload_bytes(self) -> int:
        """Bytes that follow the header of a valid frame."""
        return self.length if self.type == FrameType.PAGES else 0


def pack(header: Header) -> bytes:
    """Return the 24 bytes of a header, whatever it says."""
    return HEADER.pack(
        header.magic,
        header.type,
        header.flags,
        header.region,
        header.reserved,
        header.offset,
        header.length,
    )


def unpack(data: bytes) -> Header:
    """Return the header that 24 bytes hold, unchecked; ProtocolError for any other number of bytes."""
    if len(data) != HEADER_BYTES:
        raise ProtocolError(f"frame refused: truncated, {len(data)} of {HEADER_BYTES} bytes of its header")
    magic, kind, flags, region, reserved, offset, length = HEADER.unpack(data)
    return Header(kind, region, offset, length, magic, flags, reserved)


def refusal(header: Header, layout: Layout, direction: Direction) -> FrameRefusal:
    """Judge a header that arrived in `direction`. The order of the checks is part of the protocol."""
    if header.magic != FRAME_MAGIC:
        return FrameRefusal.MAGIC
    if header.type not in direction.value:
        return FrameRefusal.TYPE
    if header.flags or header.reserved:
        return FrameRefusal.RESERVED
    if header.type in {FrameType.END, FrameType.BEAT}:
        unused = header.region | header.offset | header.length
        return FrameRefusal.RESERVED if unused else FrameRefusal.OK
    return _range_refusal(header, layout)


def _range_refusal(header: Header, layout: Layout) -> FrameRefusal:
    """Judge which bytes a header names, once its type is known to name some."""
    if header.region >= len(layout.regions):
        return FrameRefusal.REGION
    region = layout.regions[header.region]
    if not region.aligned(header.offset, header.length):
        return FrameRefusal.ALIGNMENT
    if header.length > _length_max(header.type, region):
        return FrameRefusal.LIMIT
    # The sum cannot wrap here; in C it could, and is compared with the room behind the offset instead.
    if not region.contains(header.offset, header.length):
        return FrameRefusal.RANGE
    return FrameRefusal.OK


def _length_max(kind: int, region: Region) -> int:
    """Return the most bytes that a frame of this type may name in `region`, be the region large enough or not."""
    match kind:
        case FrameType.REQUEST:
            return region.page_size
        case FrameType.PAGES:
            return max(FRAME_BYTES_MAX, region.page_size)
        case _:
            return _U64_MAX


def validate(header: Header, layout: Layout, direction: Direction) -> None:
    """Raise ProtocolError with the reason if the header is refused."""
    reason = refusal(header, layout, direction)
    if reason is not FrameRefusal.OK:
        raise ProtocolError(f"frame refused: {explain(reason, header)}")


def explain(reason: FrameRefusal, header: Header) -> str:
    """Return the text for a refused header, for a log line: the reason and the number that is wrong."""
    where = f"region {header.region}, offset {header.offset:#x}, length {header.length:#x}"
    texts = {
        FrameRefusal.OK: f"nothing is wrong: {where}",
        FrameRefusal.MAGIC: f"bad magic {header.magic:#06x}",
        FrameRefusal.TYPE: f"unknown type {header.type} on this connection",
        FrameRefusal.REGION: f"unknown region {header.region}",
        FrameRefusal.ALIGNMENT: f"not on a page boundary: {where}",
        FrameRefusal.RANGE: f"outside the region: {where}",
        FrameRefusal.LIMIT: f"over the limit: {where}",
        FrameRefusal.RESERVED: "reserved bits are set",
    }
    return texts[reason]
