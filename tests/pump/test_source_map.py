"""The source's page map: which pages have left, and that a page that left with its hole can still be asked for."""

from __future__ import annotations

from typing import Any

import pytest

from postcopy.limits import AGAIN_BYTES_MAX
from postcopy.pages.bitmap import Bitmap
from postcopy.wire.frame import FrameType, Header
from tests.pump.source_stage import PAGE, frame_from
from tests.pump.stage import until


def test_what_has_left_is_known_page_by_page(make: Any) -> None:
    source = make(32, data=set(range(8)), has=Bitmap.from_bytes(bytes([0, 0, 0, 0b100]), 32))
    assert source.pump.residency(4) == [0.0, 0.0, 0.0, 0.125]
    source.ask(1, 9)
    frame_from(source.urgent), frame_from(source.urgent)
    assert source.pump.residency(4) == [0.125, 0.125, 0.0, 0.125]
    source.order(8, 15, zero=True)  # begins and ends within eight pages that are noted at once
    assert frame_from(source.push)[0] == Header(FrameType.ZERO, 0, 8 * PAGE, 15 * PAGE)
    until(lambda: source.pump.residency(4) == [0.125, 1.0, 0.875, 0.125], "the note of what left with the hole")
    source.order(0, 2)
    assert frame_from(source.push)[0].offset == 0
    assert source.pump.residency(16)[:2] == [1.0, 0.0]
    assert bytes(source.pump.page_map(0)) == bytes([1, 2, *[0] * 6, 3, 2, *[3] * 13, *[0] * 3, 1, *[0] * 5])


@pytest.mark.parametrize("page_size", [PAGE, 2 * AGAIN_BYTES_MAX])
def test_a_page_that_left_with_its_hole_is_answered_all_the_same(make: Any, page_size: int) -> None:
    source = make(4, data={0}, page_size=page_size)
    source.order(1, 3, zero=True)
    frame_from(source.push)
    until(lambda: source.pump.residency(1) == [0.75], "the note of what left with the hole")
    source.ask(2)
    assert frame_from(source.urgent)[0] == Header(FrameType.ZERO, 0, 2 * page_size, page_size)
    stats = source.pump.snapshot()
    assert (stats.requests, stats.requests_ignored, stats.pages_again) == (1, 0, 0)
