"""When a thread of the pump looks again and again, and when it blocks at once: what it learns from long looks."""

from __future__ import annotations

import pytest

from postcopy.pump._pump import ffi, lib

US, MS = 1_000, 1_000_000
WINDOW = 200 * US
QUICK, SLICE = 1 * US, 3 * MS
ANSWER = 700 * US  # of the event loop to a scrape
LONGEST = 1000 * MS


class Thread:
    """A thread that waits; time is its own."""

    def __init__(self, window: int = WINDOW) -> None:
        self.now = MS
        self.busy = ffi.new("uint64_t *")
        self._waiter = ffi.new("struct waiter *")
        lib.waiter_begin(self._waiter, window, self.busy)

    def is_open(self) -> bool:
        """Whether it may look, having just had something to do."""
        self._waiter.since_ns = 0
        return bool(lib.waiter_open(self._waiter, self.now))

    def look(self, took: int) -> None:
        """Look once."""
        assert self.is_open()
        lib.waiter_learn(self._waiter, self.now, took)
        self.now += took

    def look_for(self, span: int) -> None:
        """Look, with nobody else about."""
        end = self.now + span
        while self.now < end:
            self.look(QUICK)
            self.now += 50 * US

    def closed_for(self) -> int:
        """Wait until it may look again; return how long that took."""
        began = self.now
        while not self.is_open():
            self.now += 100 * US
        return self.now - began


@pytest.fixture
def thread() -> Thread:
    return Thread()


def test_it_looks_for_as_long_as_its_window_and_then_blocks(thread: Thread) -> None:
    assert thread.is_open()
    for at, may in ((WINDOW - 1, True), (WINDOW, False)):
        assert lib.waiter_open(thread._waiter, thread.now + at) is may
    assert not Thread(window=0).is_open()


def test_who_had_a_little_to_do_closes_nothing(thread: Thread) -> None:
    """Both agents are scraped ten times a second, and each time one look takes as long as the answer."""
    for _ in range(100):
        thread.look(ANSWER)
        thread.look_for(50 * MS - ANSWER)


def test_work_that_goes_on_closes_it_ever_longer(thread: Thread) -> None:
    thread.look(SLICE)
    spans = []
    for _ in range(8):
        thread.look(SLICE)
        spans.append(thread.closed_for())
    assert spans == [MS, 4 * MS, 16 * MS, 64 * MS, 256 * MS, LONGEST, LONGEST, LONGEST]


def test_after_work_that_is_over_answers_keep_it_closed_no_longer(thread: Thread) -> None:
    """However long it was closed: an answer is no sign that the work goes on, unless it meets the first looks."""
    for _ in range(5):
        thread.look(SLICE)
        thread.closed_for()
    thread.look_for(20 * MS)
    for _ in range(20):
        thread.look(ANSWER)
        thread.look_for(50 * MS)


def test_what_was_long_ago_begins_anew(thread: Thread) -> None:
    thread.look(SLICE)
    thread.look(SLICE)
    assert thread.closed_for() == MS
    thread.look(SLICE)
    assert thread.closed_for() == 4 * MS
    thread.look_for(40 * MS)
    thread.look(SLICE)
    thread.look(SLICE)
    assert thread.closed_for() == MS


def test_a_push_that_moves_closes_it_at_once(thread: Thread) -> None:
    thread.busy[0] += 1
    assert not thread.is_open()
    assert 0 < thread.closed_for() <= 2 * MS
    thread.look_for(MS)
