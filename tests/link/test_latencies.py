"""What a destination tells of its histograms, and of which guests."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from postcopy.limits import HISTOGRAM_VCPUS_MAX
from postcopy.link import destination_interpreter
from postcopy.link.destination_interpreter import DestinationInterpreter
from postcopy.link.latencies import latencies, sparse
from postcopy.pages import Layout, Region
from postcopy.pump.destination import DestinationStats
from postcopy.pump.histogram import BUCKETS, Histogram
from postcopy.session.destination import DestinationMachine
from postcopy.session.destination_steps import Step
from postcopy.session.events import Progressed
from postcopy.wire.control import Progress, encode
from postcopy.wire.latencies import EMPTY, NOTHING


def recorded(**counts):
    return Histogram([counts.get(f"b{index}", 0) for index in range(BUCKETS)], 700, 90)


def guest(vcpus):
    return SimpleNamespace(vcpus=vcpus, stall_per_vcpu=[recorded(b9=number + 1) for number in range(vcpus)])


def test_what_travels_is_what_was_recorded():
    some = recorded(b0=1, b300=1 << 40, b1151=3)
    told = sparse(some)
    assert told.buckets == ((0, 1), (300, 1 << 40), (1151, 3))
    assert [list(pair) for pair in told.buckets] == some.sparse()["buckets"]
    assert (told.sum_ns, told.max_ns) == (700, 90)
    assert sparse(Histogram()) == EMPTY


def test_each_vcpus_stalls_are_told_by_its_number():
    told = latencies(recorded(b5=2), guest(3))
    assert told.faults.buckets == ((5, 2),)
    assert [stall.buckets for stall in told.stalls] == [((9, 1),), ((9, 2),), ((9, 3),)]


def test_of_very_many_vcpus_nothing_is_told_and_nothing_of_what_nobody_clocks():
    assert len(latencies(Histogram(), guest(HISTOGRAM_VCPUS_MAX)).stalls) == HISTOGRAM_VCPUS_MAX
    assert latencies(recorded(b5=2), guest(HISTOGRAM_VCPUS_MAX + 1)).stalls == ()
    assert latencies(recorded(b5=2), SimpleNamespace(vcpus=1)).stalls == ()
    assert latencies(recorded(b5=2), None).faults.buckets == ((5, 2),)


@pytest.mark.parametrize(
    "stalls",
    [
        None,
        7,
        {"a": recorded(b9=1)},
        [1.5],
        lambda: [recorded(b9=1)],
        [recorded(b9=1), None],
        [Histogram().since(recorded(b9=1))],
        [recorded(b9=1 << 50)],
        [Histogram([1], 0.5, 1)],
        [Histogram([1], -1, 1)],
        [Histogram([1], 1 << 64, 1)],
        [Histogram([1] * (BUCKETS + 1), 1, 1)],
    ],
)
def test_a_guest_whose_stalls_are_none_is_told_without_them(stalls):
    """And is not lost for it: what a class of guests has under that name may be anything."""
    told = latencies(recorded(b5=2), SimpleNamespace(stall_per_vcpu=stalls))
    assert (told.faults.buckets, told.stalls) == (((5, 2),), ())
    encode(Progress(1, 2, 3, told))


def test_a_guest_that_raises_is_told_without_stalls():
    class Broken:
        @property
        def stall_per_vcpu(self):
            raise ZeroDivisionError

    assert latencies(recorded(b5=2), Broken()).stalls == ()


class Pump:
    """One that has served some faults."""

    def snapshot(self):
        stats = DestinationStats.of_handed_over(Layout((Region(0, "shmem", 4096, 1 << 20),)))
        return replace(stats, fault_latency=recorded(b5=2))


@pytest.mark.parametrize(
    ("step", "version", "told"),
    [
        (Step.ACTIVE, 3, latencies(recorded(b5=2), guest(2))),
        (Step.ACTIVE, 2, NOTHING),
        (Step.PAUSED, 3, NOTHING),
    ],
)
def test_a_look_at_the_pump_tells_of_both_where_anybody_hears_it(monkeypatch, step, version, told):
    async def soon(_seconds):
        await asyncio.sleep(0)

    async def story():
        machine = DestinationMachine((2, 3), (b"i" * 16, b"t" * 32), "test", "boot", DestinationInterpreter.now())
        machine.step, machine.version = step, version
        interpreter = DestinationInterpreter(machine, {}, {}, claim=None, mode="auto", poll_max_ns=0)
        interpreter._pump, interpreter.guest = Pump(), guest(2)
        looking = interpreter.spawn(interpreter._watch_progress())
        event = await interpreter._next()
        looking.cancel()
        return event

    monkeypatch.setattr(destination_interpreter, "next_round", soon)
    event = asyncio.run(asyncio.wait_for(story(), 10))
    assert isinstance(event, Progressed)
    assert event.latencies == told
