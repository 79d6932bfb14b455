"""The push's pace and its orders, with a pump that only takes notes; time is the test's own where it matters."""

import asyncio
import os
import threading
from types import SimpleNamespace

import pytest

from postcopy.link.push import BURST_SECONDS, Pace, Push
from postcopy.pages.regions import Layout, Region

PAGE = 4096
MIB = 1 << 20
SECONDS = 20


class FakePump:
    """Sends what it is given at once."""

    def __init__(self):
        self.low_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.orders = []
        self.ended = False
        self.wanted = None

    def demanded(self):
        wanted, self.wanted = self.wanted, None
        return wanted

    def push(self, extents):
        self.orders += extents
        return len(extents)

    def push_end(self):
        self.ended = True

    def snapshot(self):
        sent = sum(order.length for order in self.orders if not order.zero)
        return SimpleNamespace(queued=0, bytes_sent_push=sent)


class FakeMapping:
    """One region; every other MiB holds data."""

    def __init__(self, size=8 * MIB):
        self.region = Region(0, "shmem", PAGE, size)

    def data_extents(self):
        for offset in range(0, self.region.size, 2 * MIB):
            yield offset, MIB


def play(story):
    return asyncio.run(asyncio.wait_for(story(), SECONDS))


def make(pace, mapping=None):
    mapping = mapping or FakeMapping()
    pump = FakePump()
    return pump, Push(Layout((mapping.region,)), [mapping], pump, pace)


@pytest.mark.parametrize("rate", [0, None])
def test_zero_and_none_are_no_limit(rate):
    assert Pace(rate).rate is None
    pace = Pace(5)
    pace.rate = rate
    assert pace.rate is None
    pump, push = make(Pace(rate))
    play(push.run)
    assert sum(order.length for order in pump.orders) == 8 * MIB
    assert pump.ended


def test_the_credit_of_the_time_and_the_charge_of_what_was_sent():
    pace = Pace(1000)
    assert pace.allowance(10.0, 0)[0] == 0.0
    assert pace.allowance(10.01, 0)[0] == pytest.approx(10)
    assert pace.allowance(99.0, 0)[0] == 1000 * BURST_SECONDS  # time that was not used is not saved up
    assert pace.allowance(99.0, 1050)[0] == pytest.approx(-1000)
    assert pace.allowance(99.5, 1050)[0] == pytest.approx(-500)


def test_a_new_rate_cancels_the_debt_of_the_old_one():
    pace = Pace(1)
    pace.allowance(0.0, 0)
    debt, pause = pace.allowance(1.0, 256 << 10)
    assert debt < -200_000
    assert pause <= BURST_SECONDS
    pace.rate = 1000
    assert pace.allowance(2.0, 256 << 10)[0] == 0.0
    assert pace.allowance(2.01, 256 << 10)[0] == pytest.approx(10)
    pace.rate = 1000  # the same again changes nothing
    assert pace.allowance(2.02, 256 << 10)[0] == pytest.approx(20)


def test_what_is_sent_at_once_is_what_the_rate_allows_in_a_short_time():
    async def story():
        pace = Pace(4 * MIB)
        pump, push = make(pace)
        running = asyncio.create_task(push.run())
        while not any(not order.zero for order in pump.orders):
            await asyncio.sleep(0.002)
        pace.rate = 0
        await running
        first, *_, last = [order.length for order in pump.orders if not order.zero]
        assert first == int(4 * MIB * BURST_SECONDS) // PAGE * PAGE
        assert last == MIB  # as the data lies there

    play(story)


def test_a_rate_of_a_byte_a_second_holds_up_no_holes_and_ends_when_it_is_lifted():
    async def story():
        pace = Pace(1)
        pump, push = make(pace)
        running = asyncio.create_task(push.run())
        while sum(order.length for order in pump.orders if order.zero) < 4 * MIB:
            await asyncio.sleep(0.002)
        while not any(not order.zero for order in pump.orders):
            await asyncio.sleep(0.002)
        data = [order for order in pump.orders if not order.zero]
        assert len(data) == 1  # and with it in debt for three days
        assert not pump.ended
        pace.rate = 0
        await running
        assert sum(order.length for order in pump.orders) == 8 * MIB
        assert pump.ended

    play(story)


@pytest.mark.parametrize("rate", [None, 200 * MIB])
def test_the_push_goes_on_around_what_was_asked_for(rate):
    pump, push = make(Pace(rate), FakeMapping(64 * MIB))
    pump.wanted = (0, 33 * MIB)
    play(push.run)
    first, *_ = [order for order in pump.orders if not order.zero]
    assert first.offset == 34 * MIB  # the next MiB that holds data
    assert sum(order.length for order in pump.orders) == 64 * MIB


def test_cancelling_waits_for_the_look_at_the_file_and_ends_it_there():
    entered, go_on = threading.Event(), threading.Event()
    looks = []

    class Slow(FakeMapping):
        def data_extents(self):
            for offset, length in super().data_extents():
                looks.append(offset)
                entered.set()
                go_on.wait(SECONDS)
                yield offset, length

    async def story():
        pump, push = make(Pace(None), Slow())
        running = asyncio.create_task(push.run())
        await asyncio.to_thread(entered.wait, SECONDS)
        running.cancel()
        done, _ = await asyncio.wait({running}, timeout=0.1)
        assert not done  # the thread looks at the file: it may not be closed yet
        go_on.set()
        await asyncio.wait({running})
        assert running.cancelled()
        assert looks == [0]
        assert pump.orders == []

    play(story)
