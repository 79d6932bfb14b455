"""What a destination has: bits that travel in pieces, and what is no such thing."""

from __future__ import annotations

import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy import limits
from postcopy.errors import ProtocolError
from postcopy.pages import Bitmap
from postcopy.wire import residence
from postcopy.wire.control import Have, encode


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_bits_arrive_as_they_were_sent(bits: list[bool]) -> None:
    bitmap = Bitmap(len(bits))
    for page, bit in enumerate(bits):
        if bit:
            bitmap.set(page)
    (have,) = residence.tell(3, len(bits), iter([bitmap]))
    assert (have.region, have.first, have.pages) == (3, 0, len(bits))
    assert residence.read(have) == bitmap


def test_a_large_region_takes_several_messages_and_each_fits_whatever_its_bits() -> None:
    pages = limits.HAVE_PAGES_MAX + 8
    noise = Bitmap.from_bytes(random.Random(1).randbytes(limits.HAVE_PAGES_MAX // 8), limits.HAVE_PAGES_MAX)
    rest = Bitmap(8)
    rest.set(7)
    first, second = residence.tell(0, pages, iter([noise, rest]))
    assert (first.first, first.pages, second.first, second.pages) == (0, pages - 8, pages - 8, 8)
    assert (residence.read(first), residence.read(second)) == (noise, rest)
    assert len(encode(first)) < limits.CONTROL_BYTES_MAX


def test_every_second_page_of_8_gib_is_little() -> None:
    alternating = Bitmap.from_bytes(b"\x55" * (1 << 18), 1 << 21)
    (have,) = residence.tell(0, 1 << 21, iter([alternating]))
    assert len(have.bits) < 4096
    assert residence.read(have) == alternating


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        (b"no bits", "its bits cannot be unpacked"),
        (zlib.compress(b"\xff"), "are not 2 bytes"),
        (zlib.compress(b"\xff\x01\x00"), "are not 2 bytes"),
        (zlib.compress(b"\xff\x01")[:-1], "are not 2 bytes"),
        (zlib.compress(b"\xff\x01") + b"x", "are not 2 bytes"),
        (zlib.compress(b"\xff\x02"), "a bit is set behind the last of 9"),
        (zlib.compress(bytes(1 << 20)), "are not 2 bytes"),
    ],
)
def test_what_is_no_bitmap_of_nine_pages(bits: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        residence.read(Have(0, 0, 9, bits))
