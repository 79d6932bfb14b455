"""A bitmap: one bit a page.

What enters: page numbers, or the bytes of another agent's bitmap. What leaves: membership, counts, and runs
of equal bits. Bit `i` is bit `i % 8` (the lowest is 0) of byte `i // 8`; bits behind the last page are
always zero, so that two equal bitmaps have equal bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from postcopy.errors import ProtocolError

# Runs are found by skipping bytes that hold nothing new at the speed of a search in C: a bitmap of 64 Mi
# pages that is all ones takes milliseconds this way and many seconds bit by bit.
_NOT_ALL_CLEAR = re.compile(rb"[^\x00]")
_NOT_ALL_SET = re.compile(rb"[^\xff]")


class Bitmap:
    """`length` bits, all clear at first. A bit outside is an IndexError."""

    __slots__ = ("_bytes", "length")

    def __init__(self, length: int) -> None:
        if length < 0:
            raise ValueError(f"a bitmap of {length} bits")
        self.length = length
        self._bytes = bytearray((length + 7) // 8)

    def __len__(self) -> int:
        return self.length

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bitmap):
            return NotImplemented
        return self.length == other.length and self._bytes == other._bytes

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Bitmap({self.length}, {self.count()} set)"

    def _check(self, bit: int) -> None:
        if not 0 <= bit < self.length:
            raise IndexError(f"bit {bit} of a bitmap of {self.length}")

    def test(self, bit: int) -> bool:
        """Say whether the bit is set."""
        self._check(bit)
        return bool(self._bytes[bit >> 3] >> (bit & 7) & 1)

    def set(self, bit: int) -> None:
        """Set the bit."""
        self._check(bit)
        self._bytes[bit >> 3] |= 1 << (bit & 7)

    def clear(self, bit: int) -> None:
        """Clear the bit."""
        self._check(bit)
        self._bytes[bit >> 3] &= ~(1 << (bit & 7))

    def test_and_set(self, bit: int) -> bool:
        """Set the bit and say whether it was set before."""
        was_set = self.test(bit)
        self.set(bit)
        return was_set

    def count(self) -> int:
        """Return the number of bits that are set."""
        return int.from_bytes(self._bytes, "little").bit_count()

    def runs(self, value: bool = True) -> Iterator[tuple[int, int]]:
        """Yield each longest run of bits equal to `value` as (start, stop), in ascending order."""
        start = self._next(0, value)
        while start < self.length:
            stop = self._next(start, not value)
            yield start, stop
            start = self._next(stop, value)

    def _next(self, bit: int, value: bool) -> int:
        """Return the first bit at or after `bit` that equals `value`, or the length where there is none."""
        while bit < self.length:
            byte = self._bytes[bit >> 3] if value else ~self._bytes[bit >> 3] & 0xFF
            left = byte >> (bit & 7)
            if left:
                # At most the length: the bit behind the last page is clear, and where there is none the bytes end.
                return bit + (left & -left).bit_length() - 1
            pattern = _NOT_ALL_CLEAR if value else _NOT_ALL_SET
            found = pattern.search(self._bytes, (bit >> 3) + 1)
            if found is None:
                return self.length
            bit = found.start() * 8
        return self.length

    def union(self, other: Bitmap) -> Bitmap:
        """Return a new bitmap with the bits that are set in either; both have the same length."""
        if self.length != other.length:
            raise ValueError(f"union of bitmaps of {self.length} and {other.length} bits")
        ours, theirs = int.from_bytes(self._bytes, "little"), int.from_bytes(other._bytes, "little")
        joined = Bitmap(self.length)
        joined._bytes[:] = (ours | theirs).to_bytes(len(self._bytes), "little")
        return joined

    def invert(self) -> Bitmap:
        """Return a new bitmap with exactly the bits that are clear in this one."""
        inverted = Bitmap(self.length)
        ones = (1 << self.length) - 1
        flipped = ones ^ int.from_bytes(self._bytes, "little")
        inverted._bytes[:] = flipped.to_bytes(len(self._bytes), "little")
        return inverted

    def to_bytes(self) -> bytes:
        """Return the bits as ceil(length / 8) bytes."""
        return bytes(self._bytes)

    @classmethod
    def of_states(cls, states: bytes | bytearray | memoryview, *wanted: int) -> Bitmap:
        """Return which of these states, one byte each, are among those wanted."""
        found = bytes(states)
        bitmap = cls(len(found))
        digits = bytes(ord("1" if state in wanted else "0") for state in range(256))
        if found:
            # A number in base 2 is read as fast as it is copied; its last digit is the lowest bit.
            bits = int(found[::-1].translate(digits), 2)
            bitmap._bytes[:] = bits.to_bytes(len(bitmap._bytes), "little")
        return bitmap

    @classmethod
    def from_bytes(cls, data: bytes, length: int) -> Bitmap:
        """Return the bitmap that `to_bytes` gave `data` for; ProtocolError where it cannot have."""
        bitmap = cls(length)
        if len(data) != len(bitmap._bytes):
            raise ProtocolError(f"bitmap: {len(data)} bytes, but {length} bits take {len(bitmap._bytes)}")
        if length % 8 and data[-1] >> (length % 8):
            raise ProtocolError(f"bitmap: a bit is set behind the last of {length}")
        bitmap._bytes[:] = data
        return bitmap
