"""The push: every byte once whatever the hints, and around the demands first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from postcopy.errors import ProtocolError, UsageError
from postcopy.limits import DEMANDS_MAX
from postcopy.pages import Layout, Region
from postcopy.plan import PushExtent, PushPlan
from postcopy.plan.push import AHEAD_EXTENTS, BACK_EXTENTS

PAGE = 4096
LAYOUT = Layout((Region(0, "shmem", PAGE, 64 * PAGE), Region(1, "huge", 8 * PAGE, 64 * PAGE)))

Units = set[tuple[int, int, bool]]


def units(region: int, offset: int, length: int, zero: bool) -> Units:
    """Every 4 KiB of an extent, with what kind it is."""
    return {(region, at, zero) for at in range(offset, offset + length, PAGE)}


class PushMachine(RuleBasedStateMachine):
    """Discovery, hints and pushes in any order, against a set of pages."""

    @initialize(extent_pages=st.integers(1, 20), extra=st.integers(0, PAGE - 1))
    def begin(self, extent_pages: int, extra: int) -> None:
        self.extent_bytes = extent_pages * PAGE + extra
        self.plan = PushPlan(LAYOUT, extent_bytes=self.extent_bytes)
        self.found: Units = set()
        self.pushed: Units = set()

    @rule(region=st.integers(0, 1), data=st.data(), zero=st.booleans())
    def find(self, region: int, data: st.DataObject, zero: bool) -> None:
        bounds = LAYOUT.region(region)
        first = data.draw(st.integers(0, bounds.pages - 1))
        last = data.draw(st.integers(first, min(bounds.pages - 1, first + 20)))
        offset, length = bounds.offset_of(first), (last - first + 1) * bounds.page_size
        told = self.plan.hole if zero else self.plan.data
        known = {(where, at) for where, at, _ in self.found}
        if known & {(where, at) for where, at, _ in units(region, offset, length, zero)}:
            with pytest.raises(ValueError, match="is here already"):
                told(region, offset, length)
        else:
            told(region, offset, length)
            self.found |= units(region, offset, length, zero)

    @rule(region=st.integers(0, 1), data=st.data())
    def demand(self, region: int, data: st.DataObject) -> None:
        self.plan.demanded(region, data.draw(st.integers(0, LAYOUT.region(region).size - 1)))

    @rule(room=st.integers(-1, 9))
    def push(self, room: int) -> None:
        extents = self.plan.next(room)
        assert len(extents) <= max(0, room)
        if len(extents) < room:
            assert self.plan.done
        for extent in extents:
            bounds = LAYOUT.region(extent.region)
            assert bounds.aligned(extent.offset, extent.length)
            assert bounds.contains(extent.offset, extent.length)
            if not extent.zero:
                assert extent.length <= max(self.extent_bytes, bounds.page_size)
            pages = units(*extent)
            assert pages <= self.found, "what is pushed was found, as what it is"
            assert not pages & self.pushed, "and never before"
            self.pushed |= pages

    @invariant()
    def agree(self) -> None:
        left = self.found - self.pushed
        assert self.plan.done == (not left)
        assert self.plan.data_bytes == PAGE * sum(not zero for *_, zero in left)
        assert self.plan.hole_bytes == PAGE * sum(zero for *_, zero in left)

    def teardown(self) -> None:
        if hasattr(self, "plan"):
            self.push(10_000)
            assert self.pushed == self.found


TestPush = PushMachine.TestCase
TestPush.settings = settings(max_examples=150, stateful_step_count=30)


def ranges(extents: list[PushExtent]) -> list[tuple[int, int]]:
    """First and last page of each extent of region 0."""
    return [(extent.offset // PAGE, (extent.offset + extent.length) // PAGE - 1) for extent in extents]


def full_plan(extent_pages: int = 4) -> PushPlan:
    plan = PushPlan(LAYOUT, extent_bytes=extent_pages * PAGE)
    plan.data(0, 0, 64 * PAGE)
    return plan


def test_without_hints_lowest_first_in_extents_that_end_on_their_multiples() -> None:
    plan = PushPlan(LAYOUT, extent_bytes=4 * PAGE)
    plan.data(1, 0, 8 * PAGE)
    plan.data(0, 20 * PAGE, 2 * PAGE)
    plan.data(0, 3 * PAGE, 9 * PAGE)
    assert plan.next(10) == [
        PushExtent(0, 3 * PAGE, PAGE, zero=False),
        PushExtent(0, 4 * PAGE, 4 * PAGE, zero=False),
        PushExtent(0, 8 * PAGE, 4 * PAGE, zero=False),
        PushExtent(0, 20 * PAGE, 2 * PAGE, zero=False),
        PushExtent(1, 0, 8 * PAGE, zero=False),
    ]
    assert plan.done


def test_extents_may_become_shorter_and_longer_on_the_way() -> None:
    plan = full_plan(extent_pages=16)
    assert ranges(plan.next(1)) == [(0, 15)]
    plan.cut(2 * PAGE)
    assert ranges(plan.next(1)) == [(16, 17)]
    plan.cut(1)
    assert ranges(plan.next(1)) == [(18, 18)]
    plan.cut(16 * PAGE)
    assert ranges(plan.next(2)) == [(19, 31), (32, 47)]
    with pytest.raises(UsageError, match="extents of 0 bytes"):
        plan.cut(0)


def test_holes_go_first_and_whole() -> None:
    plan = full_plan()
    plan.hole(1, 0, 32 * PAGE)
    plan.hole(1, 32 * PAGE, 16 * PAGE)
    assert plan.next(1) == [PushExtent(1, 0, 48 * PAGE, zero=True)]
    plan.demanded(0, 0)
    plan.hole(1, 48 * PAGE, 16 * PAGE)
    assert plan.next(1)[0].zero


def test_after_a_demand_its_neighbours_go_upwards_then_downwards_then_the_rest() -> None:
    plan = full_plan()
    plan.demanded(0, 30 * PAGE)
    upwards = [(31, 31), (32, 35), (36, 39), (40, 43), (44, 46)]
    downwards = [(28, 29), (26, 27)]
    assert ranges(plan.next(9)) == [*upwards, *downwards, (0, 3), (4, 7)]
    assert (30, 30) in ranges(plan.next(100)), "the demanded page has its turn as well"


def test_the_latest_demand_goes_before_earlier_ones_which_are_not_forgotten() -> None:
    plan = full_plan()
    plan.demanded(0, 10 * PAGE)
    assert ranges(plan.next(1)) == [(11, 11)]
    plan.demanded(0, 40 * PAGE)
    assert ranges(plan.next(1)) == [(41, 43)]
    plan.next(AHEAD_EXTENTS + BACK_EXTENTS)
    assert ranges(plan.next(1)) == [(12, 15)]


def test_a_demand_follows_the_data_and_not_the_gaps() -> None:
    plan = PushPlan(LAYOUT, extent_bytes=4 * PAGE)
    plan.data(0, 0, 4 * PAGE)
    plan.data(0, 32 * PAGE, 2 * PAGE)
    plan.demanded(0, 28 * PAGE)
    assert ranges(plan.next(2)) == [(32, 33), (0, 3)]


def test_a_demand_near_the_end_and_one_where_nothing_is() -> None:
    plan = full_plan()
    plan.demanded(1, 0)
    plan.demanded(0, 63 * PAGE)
    assert ranges(plan.next(3)) == [(60, 62), (59, 59), (0, 3)]


def test_only_so_many_demands_are_kept() -> None:
    plan = PushPlan(Layout((Region(0, "shmem", PAGE, 1024 * PAGE),)), extent_bytes=PAGE)
    plan.data(0, 0, 1024 * PAGE)
    for demand in range(1, DEMANDS_MAX + 2):
        plan.demanded(0, demand * 20 * PAGE)
    around = plan.next(DEMANDS_MAX * (AHEAD_EXTENTS + BACK_EXTENTS) + 1)
    assert ranges(around)[-1] == (0, 0), "the oldest is forgotten, the push goes on from the start"
    assert all(first > 30 for first, _ in ranges(around)[:-1])


@given(st.integers(1, 3 * PAGE))
def test_a_page_larger_than_an_extent_travels_whole(extent_bytes: int) -> None:
    plan = PushPlan(LAYOUT, extent_bytes=extent_bytes)
    plan.data(1, 0, 16 * PAGE)
    assert plan.next(9) == [PushExtent(1, 0, 8 * PAGE, zero=False), PushExtent(1, 8 * PAGE, 8 * PAGE, zero=False)]


def test_a_sparse_region_costs_what_its_data_costs() -> None:
    plan = PushPlan(Layout((Region(0, "shmem", PAGE, 1 << 48),)), extent_bytes=256 << 10)
    plan.hole(0, 0, 1 << 47)
    plan.data(0, 1 << 47, 64 << 20)
    plan.hole(0, (1 << 47) + (64 << 20), (1 << 47) - (64 << 20))
    assert len(plan.next(10_000)) == 2 + 256


def test_what_makes_no_sense() -> None:
    with pytest.raises(UsageError, match="unknown order of the push 'hot': known are sequential"):
        PushPlan(LAYOUT, order="hot")
    with pytest.raises(UsageError, match="extents of 0 bytes"):
        PushPlan(LAYOUT, extent_bytes=0)
    plan = PushPlan(LAYOUT)
    for region, offset, length in [(0, 1, PAGE), (0, 0, PAGE + 1), (0, 0, 0), (0, 63 * PAGE, 2 * PAGE), (1, 0, PAGE)]:
        with pytest.raises(ValueError, match="is not whole pages"):
            plan.data(region, offset, length)
    with pytest.raises(ProtocolError, match="unknown region 2"):
        plan.hole(2, 0, PAGE)
    with pytest.raises(ProtocolError, match="unknown region 2"):
        plan.demanded(2, 0)
    with pytest.raises(ValueError, match="outside region 0"):
        plan.demanded(0, 64 * PAGE)
    assert plan.done
