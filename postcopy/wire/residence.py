"""What a destination has, for a source that comes back: pages as bits, in pieces, compressed.

What enters: the bitmap of a region's pages that the destination needs no more; HAVE messages of another agent. What
leaves: HAVE messages, none of more than HAVE_PAGES_MAX pages; the bitmap of one, or a ProtocolError. Bits and not
extents: every second page of 8 GiB is a million extents, and 256 KiB of bits whatever they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from postcopy.errors import ProtocolError
from postcopy.limits import HAVE_PAGES_MAX
from postcopy.pages.bitmap import Bitmap
from postcopy.wire.messages import Have

# Runs and holes shrink to nothing at any level, and what is left is not worth the time of a higher one.
_LEVEL = 1


def tell(region: int, pages: int, has: Iterator[Bitmap]) -> Iterator[Have]:
    """Yield what there is to say of a region of `pages` pages; `has` yields its bitmaps, HAVE_PAGES_MAX pages each."""
    for first, bitmap in zip(range(0, pages, HAVE_PAGES_MAX), has, strict=True):
        yield Have(region, first, len(bitmap), zlib.compress(bitmap.to_bytes(), _LEVEL))


def read(have: Have) -> Bitmap:
    """Return the pages that a HAVE names, bit 0 being its page `first`; ProtocolError where its bits are none."""
    expected = (have.pages + 7) // 8
    unpacking = zlib.decompressobj()
    try:
        data = unpacking.decompress(have.bits, expected + 1)
    except zlib.error as error:
        raise ProtocolError(f"message have: its bits cannot be unpacked: {error}") from None
    if not unpacking.eof or unpacking.unused_data or len(data) != expected:
        raise ProtocolError(f"message have: its bits are not {expected} bytes")
    return Bitmap.from_bytes(data, have.pages)
