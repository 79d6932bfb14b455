"""The set of intervals, compared with a set of numbers; and that it stays flat."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from postcopy.plan.intervals import Interval, IntervalSet, _Node

NUMBERS = st.integers(0, 50)


def runs(numbers: set[int]) -> list[Interval]:
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    stops = sorted(number + 1 for number in numbers if number + 1 not in numbers)
    return [Interval(start, stop) for start, stop in zip(starts, stops, strict=True)]


def walk(intervals: IntervalSet) -> list[Interval]:
    found, at = [], 0
    while (interval := intervals.at_or_after(at)) is not None:
        found.append(interval)
        at = interval.stop
    return found


def depth(node: _Node | None) -> int:
    return 0 if node is None else 1 + max(depth(node.left), depth(node.right))


class IntervalMachine(RuleBasedStateMachine):
    """The same calls on intervals and on a set."""

    def __init__(self) -> None:
        super().__init__()
        self.intervals = IntervalSet()
        self.model: set[int] = set()

    @rule(start=NUMBERS, length=st.integers(0, 9))
    def add(self, start: int, length: int) -> None:
        numbers = set(range(start, start + length))
        if numbers and not numbers & self.model:
            self.intervals.add(start, start + length)
            self.model |= numbers
        else:
            with pytest.raises(ValueError, match=r"is here already|no numbers"):
                self.intervals.add(start, start + length)

    @rule(start=NUMBERS, length=st.integers(0, 9))
    def remove(self, start: int, length: int) -> None:
        numbers = set(range(start, start + length))
        if numbers and numbers <= self.model:
            self.intervals.remove(start, start + length)
            self.model -= numbers
        else:
            with pytest.raises(ValueError, match="not all of"):
                self.intervals.remove(start, start + length)

    @rule(data=st.data())
    def remove_what_is_there(self, data: st.DataObject) -> None:
        if not self.model:
            return
        start, stop = data.draw(st.sampled_from(runs(self.model)))
        first = data.draw(st.integers(start, stop - 1))
        last = data.draw(st.integers(first + 1, stop))
        self.intervals.remove(first, last)
        self.model -= set(range(first, last))

    @invariant()
    def agree(self) -> None:
        wanted = runs(self.model)
        assert walk(self.intervals) == wanted
        assert self.intervals.count == len(wanted)
        assert self.intervals.total == len(self.model)
        for number in range(62):
            behind = [interval for interval in wanted if interval.stop > number]
            assert self.intervals.at_or_after(number) == (behind[0] if behind else None)
            lower = [interval for interval in wanted if interval.start < number]
            assert self.intervals.before(number) == (lower[-1] if lower else None)


TestIntervals = IntervalMachine.TestCase


@pytest.mark.parametrize("step", [4096, -4096])
def test_a_set_that_was_filled_in_order_is_not_a_list(step: int) -> None:
    intervals = IntervalSet()
    count = 20_000
    for number in range(count)[:: 1 if step > 0 else -1]:
        intervals.add(number * 8192, number * 8192 + 4096)
    # A perfect tree has 15 levels, a random one about 35; a list would have 20,000.
    assert depth(intervals._root) < 60


def test_memory_follows_the_intervals_not_what_they_hold() -> None:
    intervals = IntervalSet()
    for megabyte in range(1024):
        intervals.add(megabyte << 20, (megabyte + 1) << 20)
    assert intervals.count == 1
    assert intervals.total == 1 << 30
