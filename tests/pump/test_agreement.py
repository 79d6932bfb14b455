"""Facts that C and Python both know: layouts, limits, frame checks, the page map. Here they are held together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.report import trace
from postcopy import limits
from postcopy.errors import ProtocolError
from postcopy.pages.ledger import Ledger, PageState
from postcopy.pages.regions import Layout, Region
from postcopy.pump._pump import ffi, lib
from postcopy.pump.regions import Placement
from postcopy.wire import frame

LAYOUT = Layout((Region(0, "shmem", 4096, 64 * 4096), Region(1, "hugetlb-2M", 2 << 20, 4 << 20)))


def test_constants_are_the_same() -> None:
    assert lib.FRAME_MAGIC == frame.FRAME_MAGIC
    known = [name for name in limits.PUMP_IN_C if hasattr(lib, name)]
    assert len(known) >= 7
    assert {name: getattr(lib, name) for name in known} == {name: getattr(limits, name) for name in known}
    for placement in Placement:
        assert getattr(lib, f"PLACE_{placement.name}") == placement
    for state in PageState:
        assert getattr(lib, f"PAGE_{state.name}") == state
    for kind in frame.FrameType:
        assert getattr(lib, f"FRAME_{kind.name}") == kind
    assert frame.Direction.TO_SOURCE.allowed == lib.FRAMES_TO_SOURCE
    assert frame.Direction.URGENT.allowed == lib.FRAMES_URGENT
    assert frame.Direction.PUSH.allowed == lib.FRAMES_PUSH
    assert frame.Direction.PUSH_TO_SOURCE.allowed == lib.FRAMES_PUSH_TO_SOURCE


def refusal_in_c(header: bytes, allowed: int) -> int:
    bounds = ffi.new("struct frame_bounds[]", [{"size": r.size, "page_size": r.page_size} for r in LAYOUT.regions])
    return int(lib.frame_check_bytes(header, allowed, bounds, len(LAYOUT.regions)))


U64 = st.one_of(
    st.sampled_from([0, 1, 4095, 4096, 8192, 2 << 20, 4 << 20, 64 * 4096, 2**63, 2**64 - 4096, 2**64 - 1]),
    st.integers(0, 64).map(lambda pages: pages * 4096),
    st.integers(0, 2**64 - 1),
)
HEADERS = st.builds(
    frame.Header,
    type=st.integers(0, 7),
    region=st.integers(0, 3),
    offset=U64,
    length=U64,
    magic=st.sampled_from([frame.FRAME_MAGIC] * 7 + [0, 0x4350]),
    flags=st.sampled_from([0] * 7 + [1]),
    reserved=st.sampled_from([0] * 7 + [1]),
)


@settings(max_examples=2000)
@given(HEADERS, st.sampled_from(frame.Direction))
def test_both_parsers_judge_alike(header: frame.Header, direction: frame.Direction) -> None:
    assert refusal_in_c(frame.pack(header), direction.allowed) == frame.refusal(header, LAYOUT, direction)


@given(HEADERS, st.sampled_from(frame.Direction))
def test_what_c_accepts_python_accepts(header: frame.Header, direction: frame.Direction) -> None:
    if refusal_in_c(frame.pack(header), direction.allowed):
        with pytest.raises(ProtocolError):
            frame.validate(header, LAYOUT, direction)
    else:
        frame.validate(header, LAYOUT, direction)


@settings(max_examples=300)
@given(st.data())
def test_the_page_map_follows_the_ledger(data: st.DataObject) -> None:
    pages = data.draw(st.integers(1, 40), "pages")
    ledger = Ledger(pages)
    # Eight bytes more on either side: nothing outside may change, however the run lies to the words.
    states = ffi.new("uint8_t[]", pages + 16)
    ours = states + 8
    for _ in range(data.draw(st.integers(0, 60), "steps")):
        page = data.draw(st.integers(0, pages - 1))
        match data.draw(st.sampled_from(["fault", "claim", "place", "zero", "discard", "drop", "release"])):
            case "fault":
                before = ledger[page]
                ledger.fault(page)
                # Faults are the demand thread's; its moves are played here, the claims are C's.
                if before in {PageState.ABSENT, PageState.PLACING, PageState.ZERO}:
                    ours[page] = ledger[page]
            case "claim":
                assert lib.page_map_claim(ours, page) == ledger.claim(page)
            case "discard":
                before = ledger[page]
                assert lib.page_map_discard(ours, page) == before
                ledger.discard(page)
            case "release" if ledger[page] in {PageState.PLACING, PageState.WATCHED, PageState.DROPPED}:
                assert lib.page_map_release(ours, page) == ledger.release(page)
            case "drop" if ledger[page] is PageState.DROPPED:
                assert lib.page_map_kept(ours, page, 1) == 0
                ours[page] = PageState.ZERO  # the owner's move
                ledger.drop(page)
            case "place" if ledger[page] in {PageState.PLACING, PageState.WATCHED, PageState.DROPPED}:
                assert lib.page_map_placed(ours, page, 1) == ledger.place(page)
            case "zero":
                stop = data.draw(st.integers(page + 1, pages))
                reached = lib.page_map_zero(ours, page, stop)
                assert reached == next((p for p in range(page, stop) if ledger[p] != PageState.ABSENT), stop)
                for p in range(page, reached):
                    assert ledger.zero(p)
        assert bytes(ffi.buffer(ours, pages)) == ledger.to_bytes()
    assert bytes(ffi.buffer(states, 8)) == bytes(ffi.buffer(ours + pages, 8)) == bytes(8)


@settings(max_examples=500)
@given(st.binary(min_size=1, max_size=80).map(lambda raw: bytes(byte % 8 for byte in raw)), st.data())
def test_the_first_absent_page_is_found_whatever_is_around_it(states: bytes, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(states)))
    stop = data.draw(st.integers(first, len(states)))
    found = states.find(PageState.ABSENT, first, stop)
    assert lib.page_map_absent(ffi.from_buffer("uint8_t[]", states), first, stop) == (stop if found < 0 else found)


REGION = st.integers(0, limits.REGIONS_MAX - 1)


@given(st.integers(0, (1 << 34) - 1), REGION, st.integers(0, 2), st.integers(0, (1 << 22) - 1))
def test_a_traced_fault_is_read_as_it_was_written(page: int, region: int, found: int, thread: int) -> None:
    word = np.array([lib.trace_where_of(page, region, found, thread)], dtype=np.uint64)
    fields = [trace.field(word, shift, bits)[0] for shift, bits in ((0, 34), (34, 6), (40, 2), (42, 22))]
    assert fields == [page, region, found, thread]
