"""The window of the push: short while a queue stands before faults on a full link, wide in all other cases."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.pump._pump import ffi, lib

GIGABIT = 125_000_000  # bytes a second
BYTES = st.integers(lib.WINDOW_BYTES_MIN, lib.WINDOW_BYTES_MAX)
MICROSECONDS = st.integers(0, 10_000_000)
RATES = st.integers(0, 10**11)


def settled(rate: int, least_us: int, *, faults: bool = True, window: int = lib.WINDOW_BYTES_MAX) -> int:
    """Let the window act on a link of this rate until it stands still: what is under way beyond the link waits."""
    for _ in range(200):
        queue_us = max(0, window - rate * least_us // 10**6) * 10**6 // rate
        window = lib.window_next(window, rate, least_us + queue_us, least_us, faults)
    return int(window)


@pytest.mark.parametrize(("far", "begins"), [("127.0.0.1", lib.WINDOW_BYTES_MAX), ("127.0.0.2", 64 << 10)])
def test_it_begins_small_where_a_link_is_shared(far: str, begins: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        urgent, push = (socket.create_connection(listener.getsockname(), source_address=(far, 0)) for _ in range(2))
        window = ffi.new("struct window *")
        lib.window_init(window, push.fileno(), urgent.fileno())
        clamp = push.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP)
        urgent.close()
        push.close()
    assert window.bytes == begins
    assert (clamp == begins) == (begins < lib.WINDOW_BYTES_MAX)
    assert lib.window_enough(window) <= begins // 2


def test_on_a_full_link_it_becomes_what_fills_the_link_and_a_short_queue() -> None:
    window = settled(GIGABIT, 100)
    queue_us = (window - GIGABIT * 100 // 10**6) * 10**6 / GIGABIT
    assert 150 <= queue_us <= 300


def test_a_long_link_is_kept_full() -> None:
    assert settled(GIGABIT, 20_000) >= GIGABIT * 20_000 // 10**6


def test_without_faults_the_push_has_the_link_to_itself() -> None:
    assert settled(GIGABIT, 100, faults=False, window=lib.WINDOW_BYTES_MIN) == lib.WINDOW_BYTES_MAX


@given(BYTES, RATES, MICROSECONDS, MICROSECONDS, st.booleans())
def test_it_never_leaves_its_bounds(window: int, rate: int, trip: int, least: int, faults: bool) -> None:
    assert lib.WINDOW_BYTES_MIN <= lib.window_next(window, rate, trip, least, faults) <= lib.WINDOW_BYTES_MAX


@given(BYTES, RATES, MICROSECONDS, MICROSECONDS)
def test_no_queue_never_narrows_it_and_a_long_one_never_widens_it(
    window: int, rate: int, least: int, more: int
) -> None:
    assert lib.window_next(window, rate, least, least, True) >= window
    assert lib.window_next(window, rate, least + 1000 + more, least, True) <= window
