"""A set of numbers kept as disjoint intervals, for pages that are still to be sent.

What enters: intervals to add and to remove. What leaves: the interval at or after a place, or before it.
Every operation takes O(log n) for n intervals on the average, and the memory is proportional to n, however
long they are.

It is a treap: a search tree by the intervals' starts, and at the same time a heap by ranks that are as good
as random, which keeps it flat whatever the order of additions. Taking bytes off the end of an interval, the
usual case of a push, changes its bounds in place and moves nothing.
"""

from __future__ import annotations

from typing import NamedTuple

_MASK = (1 << 64) - 1


class Interval(NamedTuple):
    """The numbers from `start` up to, not including, `stop`."""

    start: int
    stop: int


class _Node:
    __slots__ = ("left", "rank", "right", "start", "stop")

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.rank = _rank(start)
        self.left: _Node | None = None
        self.right: _Node | None = None


def _rank(number: int) -> int:
    """Mix a number until its neighbours have nothing in common (the finalizer of splitmix64)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31


class IntervalSet:
    """Disjoint intervals; those that touch are one. `total` is how many numbers they hold together."""

    __slots__ = ("_root", "count", "total")

    def __init__(self) -> None:
        self._root: _Node | None = None
        self.count = 0
        self.total = 0

    def add(self, start: int, stop: int) -> None:
        """Add the numbers from `start` to `stop`; ValueError if any of them is here already, or if there are none."""
        if start >= stop:
            raise ValueError(f"no numbers from {start} to {stop}")
        before, after = self._last_below(start + 1), self._first_at_least(start + 1)
        if (before and before.stop > start) or (after and after.start < stop):
            raise ValueError(f"some of {start} to {stop} is here already")
        self.total += stop - start
        if before and before.stop == start:
            before.stop = stop
            if after and after.start == stop:
                self._delete(after)
                before.stop = after.stop
        elif after and after.start == stop:
            # Nothing lies between the old start and the new one, so the order of the tree stays.
            after.start = start
        else:
            self._insert(_Node(start, stop))

    def remove(self, start: int, stop: int) -> None:
        """Remove numbers that one interval holds, all of them; else ValueError."""
        node = self._last_below(start + 1)
        if start >= stop or node is None or node.stop < stop:
            raise ValueError(f"not all of {start} to {stop} is here")
        self.total -= stop - start
        if node.start == start and node.stop == stop:
            self._delete(node)
        elif node.start == start:
            node.start = stop
        else:
            rest = node.stop
            node.stop = start
            if stop < rest:
                self._insert(_Node(stop, rest))

    def at_or_after(self, number: int) -> Interval | None:
        """Return the interval that holds `number`, or the first behind it; None if there is none."""
        node = self._last_below(number + 1)
        if node is None or node.stop <= number:
            node = self._first_at_least(number)
        return Interval(node.start, node.stop) if node else None

    def before(self, number: int) -> Interval | None:
        """Return the last interval that begins before `number`; None if there is none. It may reach beyond it."""
        node = self._last_below(number)
        return Interval(node.start, node.stop) if node else None

    def _last_below(self, number: int) -> _Node | None:
        """Return the node with the highest start below `number`."""
        node, found = self._root, None
        while node is not None:
            if node.start < number:
                node, found = node.right, node
            else:
                node = node.left
        return found

    def _first_at_least(self, number: int) -> _Node | None:
        """Return the node with the lowest start of at least `number`."""
        node, found = self._root, None
        while node is not None:
            if node.start >= number:
                node, found = node.left, node
            else:
                node = node.right
        return found

    def _insert(self, node: _Node) -> None:
        lower, higher = _cut(self._root, node.start)
        self._root = _join(_join(lower, node), higher)
        self.count += 1

    def _delete(self, node: _Node) -> None:
        lower, rest = _cut(self._root, node.start)
        _, higher = _cut(rest, node.start + 1)
        self._root = _join(lower, higher)
        self.count -= 1


def _cut(tree: _Node | None, number: int) -> tuple[_Node | None, _Node | None]:
    """Cut a tree in two: the nodes that start below `number`, and the others."""
    if tree is None:
        return None, None
    if tree.start < number:
        tree.right, higher = _cut(tree.right, number)
        return tree, higher
    lower, tree.left = _cut(tree.left, number)
    return lower, tree


def _join(lower: _Node | None, higher: _Node | None) -> _Node | None:
    """Make one tree of two, of which the first has the lower starts."""
    if lower is None or higher is None:
        return lower or higher
    if lower.rank > higher.rank:
        lower.right = _join(lower.right, higher)
        return lower
    higher.left = _join(lower, higher.left)
    return higher
