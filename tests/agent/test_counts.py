"""What a daemon counts never goes back, whatever its migrations do."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.counts import Counts, Totals, counts_of, faults_by_result, mode_of, not_taken_back, pages_sent
from postcopy.errors import HostError
from postcopy.link.destination_interpreter import DestinationInterpreter
from postcopy.pages.regions import Layout, Region
from postcopy.pump.destination import DestinationStats
from postcopy.pump.histogram import BUCKETS, Histogram
from postcopy.session.commands import Settle, StopPump
from postcopy.session.states import State
from postcopy.wire.frame import HEADER_BYTES
from tests.session import samples


def recorded(bucket, count=1):
    return Histogram(tuple(count * (index == bucket) for index in range(BUCKETS)), 100 * count, 100)


class Came(DestinationInterpreter):
    """A migration to here whose counters are in our hand."""

    def __init__(self, **counters):  # nothing of it runs
        self.role = "destination"
        self.machine = SimpleNamespace(reconnects=1, state=State.POSTCOPY_ACTIVE)
        self.channel, self._former_bytes = None, (5, 7)
        self.guest = SimpleNamespace(stall=recorded(9))
        self.count(**counters)

    def count(self, **counters):
        nothing = DestinationStats.of_handed_over(Layout((Region(0, "shmem", 4096, 65536),)))
        whole = {name: getattr(nothing, name) for name in nothing.__slots__} | {"pages_handed_over": 0} | counters
        self._stats = DestinationStats(**whole)

    def snapshot(self):
        return self._stats


def test_migrations_add_up_and_the_latest_is_told_apart():
    totals = Totals()
    assert totals.counts() == Counts()
    first = Came(pages_demand=3, fault_latency=recorded(7), faults_missing=3, requests=3)
    totals.begin(first)
    assert totals.counts().pages["received", "demand"] == 3
    first.count(pages_demand=10, fault_latency=recorded(7, 10), faults_missing=10, requests=10)  # unseen until the next
    second = Came(pages_demand=1, fault_latency=recorded(8), faults_missing=1, requests=1)
    totals.begin(second)
    totals.note("destination", "auto", State.COMPLETED)
    whole = totals.counts()
    assert whole.pages["received", "demand"] == 11
    assert whole.fault_latency == recorded(7, 10).merge(recorded(8))
    assert whole.stall == recorded(9, 2)
    assert whole.transferred["received", "control"] == 14
    assert whole.reconnects == 2
    assert whole.faults["missing", "requested"] == 11
    assert whole.migrations == {("destination", "auto", "completed"): 1}
    assert totals.ended == 1
    beside = totals.counts([Came(pages_demand=100), Came(pages_demand=1000)])
    assert (beside.pages["received", "demand"], beside.reconnects) == (1111, 4)
    assert totals.latest("destination").pages["received", "demand"] == 1
    assert totals.latest("source") == Counts()


class Beaten:
    """A pump on whose connections a heartbeat comes at each look."""

    LAYOUT = Layout((Region(0, "shmem", 4096, 65536),))

    def __init__(self):
        self.looks = 0

    def progress(self):
        return 16, 1

    def snapshot(self):
        self.looks += 1
        whole = DestinationStats.of_handed_over(self.LAYOUT)
        return replace(
            whole, pages_handed_over=0, pages_push=16, pending=1, beats=self.looks,
            bytes_received_push=65536, bytes_received_urgent=HEADER_BYTES * self.looks,
        )  # fmt: skip

    def stop(self):
        pass

    def close(self):
        pass


def test_what_comes_between_the_report_and_the_pumps_end_is_in_neither():
    one = DestinationInterpreter(samples.destination(), {}, {}, claim=None, mode="auto", poll_max_ns=0)
    one.memory = SimpleNamespace(layout=Beaten.LAYOUT, resident=False)
    one.guest = SimpleNamespace(stall=Histogram(), first_step_at=None, vcpus=1)
    one._pump = Beaten()

    def received():
        return sum(count for (way, _), count in counts_of(one).transferred.items() if way == "received")

    before = received()
    asyncio.run(one._sum_up())
    told = one.report["bytes"]["wire"]
    assert told > before
    assert (received(), one.snapshot().pending) == (told, 0)
    asyncio.run(one._stop_pump(StopPump()))
    assert received() == told
    one.memory.resident, one._told = True, None  # where each page that is touched is trapped and counted, it goes on
    one.report, one._pump = None, Beaten()
    asyncio.run(one._sum_up())
    assert received() > one.report["bytes"]["wire"]


def test_faults_that_the_kernel_will_not_stop_trapping_are_counted_on():
    def refused():
        raise HostError("the kernel traps on")

    one = DestinationInterpreter(samples.destination(), {}, {}, claim=None, mode="auto", poll_max_ns=0)
    one.memory = SimpleNamespace(layout=Beaten.LAYOUT, resident=False, trap_no_more=refused)
    one.guest = SimpleNamespace(stall=Histogram(), first_step_at=None, vcpus=1)
    one._pump = Beaten()
    asyncio.run(one._sum_up())
    told = one.snapshot()
    with pytest.raises(HostError):
        asyncio.run(one._settle(Settle()))
    asyncio.run(one._stop_pump(StopPump()))  # whose thread stays for them
    assert told.beats < one.snapshot().beats < one.snapshot().beats
    assert (told.pending, one.snapshot().pending, one.progress()) == (0, 1, (16, 1))


class Late(Beaten):
    """A pump that counts one fault more at each of its first looks, and notes how long they took at the third."""

    def snapshot(self):
        stats = super().snapshot()
        faults = min(self.looks, 2)
        return replace(stats, faults_missing=faults, fault_latency=recorded(7, faults if self.looks > 2 else 1))


def test_a_report_waits_for_the_time_of_the_last_fault():
    one = DestinationInterpreter(samples.destination(), {}, {}, claim=None, mode="auto", poll_max_ns=0)
    one.memory = SimpleNamespace(layout=Beaten.LAYOUT, resident=False)
    one.guest = SimpleNamespace(stall=Histogram(), first_step_at=None, vcpus=1)
    one._pump = Late()
    one._pump.snapshot()
    asyncio.run(one._sum_up())
    assert one.report["fault_latency_seconds"]["count"] == 2
    assert counts_of(one).faults == {**dict.fromkeys(counts_of(one).faults, 0), ("missing", "joined"): 2}


def test_memory_that_was_handed_over_to_nobody_is_not_counted():
    totals, one = Totals(), Came(pages_handed_over=16)
    totals.begin(one)
    one.machine.state = State.SETUP
    assert ("received", "handed_over") not in totals.counts().pages
    one.machine.state = State.COMPLETED
    assert totals.counts().pages["received", "handed_over"] == 16


def test_faults_by_result_never_go_back():
    first = faults_by_result({"missing": 10, "minor": 2, "wp": 0}, 9)
    assert first == {
        ("missing", "requested"): 9, ("missing", "joined"): 1,
        ("minor", "requested"): 0, ("minor", "joined"): 2,
        ("wp", "requested"): 0, ("wp", "joined"): 0,
    }  # fmt: skip
    second = not_taken_back(faults_by_result({"missing": 11, "minor": 2, "wp": 0}, 11), first)
    assert (second["missing", "requested"], second["missing", "joined"]) == (10, 1)
    third = not_taken_back(faults_by_result({"missing": 12, "minor": 3, "wp": 0}, 11), second)
    assert (third["missing", "requested"], third["missing", "joined"]) == (11, 1)
    assert (third["minor", "requested"], third["minor", "joined"]) == (0, 3)
    # for as long as no request is counted, it is another kind that seems to have fewer
    fourth = not_taken_back(faults_by_result({"missing": 12, "minor": 5, "wp": 0}, 14), third)
    assert (fourth["minor", "requested"], fourth["minor", "joined"]) == (2, 3)
    fifth = not_taken_back(faults_by_result({"missing": 13, "minor": 5, "wp": 0}, 14), fourth)
    assert (fifth["minor", "requested"], fifth["minor", "joined"]) == (2, 3)
    assert (fifth["missing", "requested"], fifth["missing", "joined"]) == (12, 1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 9)), min_size=1))
def test_faults_by_result_never_go_back_and_always_add_up(steps):
    kinds, requests, told = {"missing": 0, "minor": 0, "wp": 0}, 0, {}
    for *more, asked in steps:
        kinds = {kind: count + some for (kind, count), some in zip(kinds.items(), more, strict=True)}
        requests = min(requests + asked, sum(kinds.values()))
        before, told = told, not_taken_back(faults_by_result(kinds, requests), told)
        assert all(told[key] >= count for key, count in before.items())
        for kind, count in kinds.items():
            assert told[kind, "requested"] + told[kind, "joined"] == count


def test_what_was_told_of_faults_is_not_taken_back():
    """The pump counts a request a moment after its fault: meanwhile its page seems to be on its way already."""
    totals, one = Totals(), Came(faults_missing=10, requests=9)
    totals.begin(one)
    assert totals.counts().faults["missing", "joined"] == 1
    one.count(faults_missing=10, requests=10)
    assert totals.counts().faults["missing", "joined"] == 1


def sent(demand, push, zero, again):
    stats = SimpleNamespace(pages_demand=demand, pages_push=push, pages_zero=zero, pages_again=again)
    return pages_sent(stats, 100)


def test_pages_of_the_source_add_up():
    assert sent(10, 20, 5, 3) == {"demand": 10, "push": 20, "zero": 5, "duplicate": 3}
    whole = sent(30, 60, 17, 4)  # three of them were holes that were asked for
    assert whole["demand"] + whole["push"] + whole["zero"] - whole["duplicate"] == 100


def test_known_modes_are_labels():
    assert [mode_of({"mode": mode}) for mode in ("auto", "minor", "missing", "move", "else")] == [
        "auto", "minor", "missing", "move", "none",
    ]  # fmt: skip
    assert mode_of(None) == "none"
