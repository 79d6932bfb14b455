"""Rounds: that whoever waits for one goes on together with all others, and that nobody who does not wait is woken."""

import asyncio
import gc
import selectors
import weakref

import pytest
import uvloop

from postcopy.link import rounds
from postcopy.link.rounds import ROUND_SECONDS, next_round

# So much before its time a timer of an event loop may call: some know milliseconds only.
HASTE_SECONDS = 0.001


class Timeless(selectors.DefaultSelector):
    """Waits for nothing: what a wait would take is added to the clock."""

    def __init__(self):
        super().__init__()
        self.now = 50.03
        self.late = 0.0
        self.waits = 0

    def select(self, timeout=None):
        if timeout:
            self.now += max(timeout + self.late, 1e-9)
            self.waits += 1
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock is in our hand: it stands still while anything runs."""

    def __init__(self):
        self.clock = Timeless()
        super().__init__(self.clock)
        self._clock_resolution = HASTE_SECONDS

    def time(self):
        return self.clock.now


@pytest.fixture
def loop():
    with asyncio.Runner(loop_factory=Loop) as runner:
        yield Playing(runner)


class Playing:
    def __init__(self, runner):
        self.run, self.now, self.clock = runner.run, runner.get_loop().time, runner.get_loop().clock


async def waiting(seconds, times, after=0.0):
    """Wait again and again; return when it went on."""
    loop, went_on = asyncio.get_running_loop(), []
    await asyncio.sleep(after)
    for _ in range(times):
        await next_round(seconds)
        went_on.append(loop.time())
    return went_on


def test_whoever_waits_goes_on_with_all_others_whenever_they_began(loop):
    async def body():
        return await asyncio.gather(
            waiting(ROUND_SECONDS, 12),
            waiting(3 * ROUND_SECONDS, 3, 0.37 * ROUND_SECONDS),
            waiting(ROUND_SECONDS, 10, 0.58 * ROUND_SECONDS),
        )

    often, seldom, late = loop.run(body())
    assert {*seldom, *late} <= {*often}
    assert [round((one - often[0]) / ROUND_SECONDS, 6) for one in often] == [*range(12)]
    assert loop.clock.waits == len(often) + 2, "and two that began in between"


@pytest.mark.parametrize("late", [0.0, 0.001, -0.9 * HASTE_SECONDS, 0.05 * ROUND_SECONDS])
def test_a_round_that_comes_late_or_early_is_followed_by_the_next_one(loop, late):
    """An event loop's timers know milliseconds, and this loop may have had no CPU just then."""
    loop.clock.late = late
    began = loop.now()
    went_on = loop.run(waiting(ROUND_SECONDS, 5))
    assert [round((one - began) / ROUND_SECONDS) for one in went_on] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("began", [0.0, 0.05, 0.3, 0.5, 0.93, 0.999])
@pytest.mark.parametrize("rounds_away", [1, 1.5, 5])
def test_nobody_goes_on_much_sooner_than_asked_for(loop, began, rounds_away):
    async def body():
        first = asyncio.create_task(next_round())  # from here on they are counted
        await asyncio.sleep(began * ROUND_SECONDS)
        asked_at = loop.now()
        (went_on,) = await waiting(rounds_away * ROUND_SECONDS, 1)
        await first
        return (went_on - asked_at) / ROUND_SECONDS

    assert rounds_away - 0.1 - 1e-6 <= loop.run(body()) <= rounds_away + 0.9 + 1e-6


def test_what_is_sooner_than_a_round_waits_for_none(loop):
    began = loop.now()
    went_on = loop.run(waiting(0.05 * ROUND_SECONDS, 5))
    assert [round((one - began) / ROUND_SECONDS, 6) for one in went_on] == [0.05, 0.1, 0.15, 0.2, 0.25]


def test_no_round_begins_twice(loop):
    """Whoever asks at its beginning, of which a timer's haste may make a moment before it, waits for the one after."""
    loop.clock.late = -0.9 * HASTE_SECONDS

    async def body():
        kept = rounds._Rounds(asyncio.get_running_loop())
        began = loop.now()
        for _ in range(3):
            await kept.wait(asyncio.get_running_loop(), 0.0)
        return (loop.now() - began) / ROUND_SECONDS

    assert loop.run(body()) > 2.9


def test_where_nobody_waits_any_more_nobody_is_woken(loop):
    async def body():
        begun = [asyncio.create_task(next_round()) for _ in range(2)]
        await asyncio.sleep(0)
        for one in begun:
            one.cancel()
        await asyncio.wait(begun)
        before = loop.clock.waits
        await asyncio.sleep(3 * ROUND_SECONDS)
        return loop.clock.waits - before

    assert loop.run(body()) == 1


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_who_is_cancelled_while_he_waits_is_in_nobodys_way(run):
    async def body():
        begun = [asyncio.create_task(next_round()) for _ in range(3)]
        await asyncio.sleep(0)
        begun[1].cancel()
        return await asyncio.gather(*begun, return_exceptions=True)

    first, second, third = run(body())
    assert (first, third) == (None, None)
    assert isinstance(second, asyncio.CancelledError)


def test_who_is_cancelled_as_a_round_begins_is_in_nobodys_way(loop):
    async def body():
        begun = [asyncio.create_task(next_round()) for _ in range(2)]
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(ROUND_SECONDS - 1e-9, begun[0].cancel)  # in one turn of the loop with it
        return await asyncio.gather(*begun, return_exceptions=True)

    first, second = loop.run(body())
    assert isinstance(first, asyncio.CancelledError)
    assert second is None


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_an_event_loop_that_has_ended_is_forgotten(run):
    async def body():
        ended = asyncio.create_task(next_round(60))
        await asyncio.sleep(0)
        assert not ended.done()
        return weakref.ref(asyncio.get_running_loop())

    loop = run(body())
    gc.collect()
    assert loop() is None
