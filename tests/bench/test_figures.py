"""Medians, ratios, the best floor, the middle run: arithmetic with nothing measured."""

from __future__ import annotations

import pytest

from agent.bench.figures import best, better, figures_of, medians, middle_run, ratios, starvation

TIMES = {"count": 4, "p50": 1e-5, "p90": 2e-5, "p99": 3e-5, "p999": 4e-5, "max": 5e-5, "mean": 1e-5}


def report(**changes):
    return {
        "memory": [{"type": "shmem", "page_size": 4096, "size_bytes": 1 << 29}],
        "fault_latency_seconds": TIMES,
        "stall_seconds": {**TIMES, "p50": 2e-5, "sum": 1e-4},
        "throughput_bytes_per_second": 2e9,
        "cpu_seconds": {"source": 0.25, "destination": 0.5},
        "resident_seconds": 0.5,
        "downtime_seconds": 0.001,
        "total_seconds": 0.75,
    } | changes


def test_a_report_is_reduced_to_figures():
    assert figures_of(report()) == {
        "fault_p50": 1e-5,
        "fault_p99": 3e-5,
        "stall_p50": 2e-5,
        "stall_p99": 3e-5,
        "throughput": 2e9,
        "cpu": 1.5,  # seconds for half a GiB are doubled
        "faults_per_second": 8.0,
        "downtime": 0.001,
        "total": 0.75,
    }


def test_what_did_not_happen_has_no_figure():
    none = {**TIMES, "count": 0}
    figures = figures_of(report(fault_latency_seconds=none, stall_seconds=none))
    assert {"fault_p50", "fault_p99", "stall_p50", "stall_p99"}.isdisjoint(figures)


def test_medians_are_taken_over_the_runs_that_have_the_figure():
    runs = [{"fault_p50": 3.0, "cpu": 1.0}, {"fault_p50": 1.0}, {"fault_p50": 100.0, "cpu": 2.0}]
    assert medians(runs) == {"fault_p50": 3.0, "cpu": 1.5}
    assert medians([]) == {}


def test_ratios_are_product_over_floor():
    product = {"fault_p50": 3.0, "fault_p99": 8.0, "throughput": 9.0, "cpu": 1.0}
    assert ratios(product, {"fault_p50": 2.0, "throughput": 10.0, "cpu": 0.0}) == {
        "fault_p50": 1.5,
        "fault_p99": None,
        "throughput": 0.9,
        "cpu": None,
    }
    assert set(ratios(product, None).values()) == {None}


def test_the_best_floor_is_best_in_all_that_counts():
    floors = {
        "blocks": {"fault_p50": 80.0, "fault_p99": 100.0},
        "polls": {"fault_p50": 12.0, "fault_p99": 30.0},
        "lucky": {"fault_p50": 11.0, "fault_p99": 3000.0},
    }
    assert best(floors, ("fault_p50", "fault_p99")) == "polls"
    assert best(floors, ("fault_p50",)) == "lucky"
    streams = {"copy": {"throughput": 2.3}, "continue": {"throughput": 1.6}, "failed": {}}
    assert best(streams, ("throughput",)) == "copy"


@pytest.mark.parametrize(("name", "expected"), [("throughput", True), ("fault_p50", False)])
def test_more_is_better_of_some(name, expected):
    assert better(name, 2.0, 1.0) is expected


def test_the_middle_run_is_a_real_one():
    runs = [{"cpu": 5.0}, {"cpu": 1.0}, {"cpu": 3.0}, {}]
    assert middle_run(runs, "cpu") == 2
    assert middle_run(runs[:2], "cpu") == 1
    assert middle_run([{}], "cpu") == 0


def test_starvation_is_the_slowest_to_the_median():
    assert starvation([1.0, 2.0, 10.0]) == 5.0
    assert starvation([0.0, 0.0]) == 1.0
