"""What makes a run dishonest is said, and what is merely the kernel's queueing is not."""

from __future__ import annotations

import pytest

from agent.bench.checks import complaints, disagreement, floor_complaints, residency, scraping
from agent.bench.machine import Load, Sample

FAULTS = {"count": 1000, "p50": 12e-6, "p99": 30e-6}
STALLS = {"count": 1010, "p50": 20e-6, "p99": 60e-6}
METRICS = {"postcopy_faults_total": 1000.0, "postcopy_fault_latency_seconds_count": 1000.0}


def report(**changes):
    return {
        "fault_latency_seconds": FAULTS,
        "stall_seconds": STALLS,
        "pages": {"total": 1000, "demand": 1000, "push": 0, "zero": 0, "duplicate": 0},
        "integrity": {"pages_checked": 1000, "pages_mismatched": 0},
    } | changes


def said(metrics=METRICS, push=False, **changes):
    return complaints(report(**changes), metrics, vcpus=1, push=push)


def test_an_honest_run_has_no_complaints():
    assert said() == []
    assert said(metrics={}) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"integrity": {"pages_checked": 1000, "pages_mismatched": 2}}, "2 of 1000 pages differ"),
        ({"integrity": {"pages_checked": 0, "pages_mismatched": 0}}, "no page was checked"),
        ({"pages": {"total": 1000, "demand": 999, "push": 0, "zero": 0}}, "do not add up"),
        ({"pages": {"total": 1000, "demand": 999, "push": 1, "zero": 0}}, "pushed without a push"),
        ({"metrics": {**METRICS, "postcopy_faults_total": 1001.0}}, "faults_total is 1001"),
        ({"metrics": {"postcopy_up": 1.0}}, "faults_total is None"),
        ({"stall_seconds": {**STALLS, "count": 900}}, "felt 900 stalls"),
        ({"stall_seconds": {**STALLS, "p50": 300e-6}}, "p50"),
        ({"stall_seconds": {**STALLS, "p99": 9e-3}}, "p99"),
    ],
)
def test_a_contradiction_is_said(changes, words):
    (complaint,) = said(**changes)
    assert words in complaint


def test_few_faults_and_many_other_stalls_are_no_contradiction():
    assert disagreement({**FAULTS, "count": 20}, {**STALLS, "count": 21, "p50": 1.0}, 1) == []
    assert disagreement(FAULTS, {**STALLS, "count": 3000, "p50": 1.0}, 1) == []


def test_on_a_disturbed_machine_a_slice_may_lie_between_the_clocks():
    late = report(stall_seconds={**STALLS, "p50": 300e-6})
    assert complaints(late, METRICS, vcpus=1, push=False)
    assert complaints(late, METRICS, vcpus=1, push=False, disturbed=True) == []


def test_vcpus_wait_for_each_other():
    stalls = {**STALLS, "p50": 700e-6}
    assert disagreement(FAULTS, stalls, 1)
    assert disagreement(FAULTS, stalls, 16) == []


def test_what_is_resident_is_what_was_touched():
    assert residency(944, 944, 944) == []
    assert len(residency(945, 944, 944)) == 1
    assert len(residency(0, 0, 3)) == 1


def test_a_run_that_was_not_scraped_is_none_that_was():
    assert scraping(0, 0.0) == []
    assert scraping(0, 2.0) == [], "too short for the first one"
    assert scraping(30, 60.0) == []
    (complaint,) = scraping(20, 60.0)
    assert complaint == "metrics were answered 20 times, 60 times would have been the rate"
    assert len(scraping(0, 60.0)) == 1


def test_a_floor_is_held_to_the_same():
    assert floor_complaints(10, 0, 10, 10) == []
    assert len(floor_complaints(10, 1, 10, 10)) == 1
    assert len(floor_complaints(0, 0, 10, 10)) == 1
    assert len(floor_complaints(10, 0, 11, 10)) == 1


def sample(**changes):
    return Sample(**({"at": 0.0, "busy": 0.0, "steal": 0.0, "own": 0.0, "switches": 0, "load": 0.5} | changes))


def test_what_others_used_is_what_was_busy_and_not_ours(monkeypatch):
    monkeypatch.setattr("agent.bench.machine.os.cpu_count", lambda: 2)
    load = sample().until(sample(at=10.0, busy=9.0, own=4.0, steal=0.1, switches=7, load=1.5))
    assert load == Load(others=0.25, steal=0.005, before=0.5, after=1.5, involuntary_switches=7)
    assert load.disturbed
    quiet = sample().until(sample(at=10.0, busy=4.0, own=4.5))
    assert quiet.others == 0.0
    assert not quiet.disturbed
    assert sample().until(sample(at=10.0, steal=1.0)).disturbed


def test_the_machine_is_looked_at():
    first = Sample.take()
    second = Sample.take()
    assert second.at >= first.at
    assert second.busy >= first.busy
    assert second.own >= first.own
