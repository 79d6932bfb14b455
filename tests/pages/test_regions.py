"""Regions: what is refused, and arithmetic that comes back to where it began."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import ProtocolError, UsageError
from postcopy.pages import Layout, Region

PAGE_SIZES = st.sampled_from([1, 4096, 65536, 2 << 20, 1 << 30])


@st.composite
def regions(draw: st.DrawFn, index: int = 0) -> Region:
    page_size = draw(PAGE_SIZES)
    return Region(index, "shmem", page_size, page_size * draw(st.integers(1, 1 << 20)))


@pytest.mark.parametrize(
    ("page_size", "size", "text"),
    [
        (4096, 0, "size 0 is not above zero"),
        (4096, -4096, "size -4096 is not above zero"),
        (4096, 4097, "size 4097 is not a multiple of the page size 4096"),
        (4096, 1 << 63, "beyond 2"),
        (12288, 12288, "page size 12288 is not a power of two"),
        (0, 4096, "page size 0 is not a power of two"),
        (-4096, 4096, "page size -4096 is not a power of two"),
    ],
)
def test_numbers_that_make_no_sense(page_size: int, size: int, text: str) -> None:
    with pytest.raises(UsageError, match=text) as raised:
        Region(0, "shmem", page_size, size)
    assert raised.value.exit_status == 2


def test_a_negative_index() -> None:
    with pytest.raises(UsageError, match="negative"):
        Region(-1, "shmem", 4096, 4096)


@given(regions(), st.data())
def test_a_page_holds_the_bytes_between_its_offset_and_the_next(region: Region, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, region.size - 1))
    page = region.page_of(offset)
    assert 0 <= page < region.pages
    assert region.offset_of(page) <= offset < region.offset_of(page) + region.page_size
    assert region.page_of(region.offset_of(page)) == page


@given(regions())
def test_places_outside_are_refused(region: Region) -> None:
    for offset in (-1, region.size):
        with pytest.raises(ValueError, match="outside region 0"):
            region.page_of(offset)
    for page in (-1, region.pages):
        with pytest.raises(ValueError, match="outside region 0"):
            region.offset_of(page)


@given(st.integers(1, 8), st.integers(-9, 9), st.integers(-9, 9))
def test_contains_is_membership_of_every_byte(pages: int, offset: int, length: int) -> None:
    region = Region(0, "shmem", 1, pages)
    bytes_of_it = range(offset, offset + length)
    assert region.contains(offset, length) == (len(bytes_of_it) > 0 and all(0 <= at < pages for at in bytes_of_it))


@pytest.mark.parametrize(
    ("offset", "length", "aligned"),
    [(0, 4096, True), (4096, 8192, True), (0, 0, False), (1, 4096, False), (0, 4097, False), (4096, -4096, False)],
)
def test_aligned_means_whole_pages_and_at_least_one(offset: int, length: int, aligned: bool) -> None:
    assert Region(0, "shmem", 4096, 1 << 20).aligned(offset, length) is aligned


def test_a_layout_adds_up_and_finds_its_regions() -> None:
    small, huge = Region(0, "shmem", 4096, 8192), Region(1, "hugetlb-2M", 2 << 20, 4 << 20)
    layout = Layout((small, huge))
    assert layout.size == 8192 + (4 << 20)
    assert layout.pages == 4
    assert layout.region(1) is huge
    for index in (-1, 2):
        with pytest.raises(ProtocolError, match=f"unknown region {index}: the layout has 2"):
            layout.region(index)


def test_a_layout_is_in_the_order_of_its_indexes() -> None:
    region = Region(1, "shmem", 4096, 4096)
    with pytest.raises(UsageError, match="region 1 stands at position 0"):
        Layout((region,))
    with pytest.raises(UsageError, match="at least one region"):
        Layout(())
