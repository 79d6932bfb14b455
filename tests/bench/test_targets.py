"""Targets: bounds, verdicts, and that the table of what must be reached says what it is meant to say."""

from __future__ import annotations

import pytest

from agent.bench.scenarios import GIB, Machine, catalogue
from agent.bench.targets import FLOOR, Target, Verdict, format_figure, judge

ROOMY = Machine(available=64 * GIB, huge_pages=1024)


@pytest.mark.parametrize(
    ("target", "value", "reached"),
    [
        (Target("fault_p50", "<=", 1.3, FLOOR), 13.0, True),
        (Target("fault_p50", "<=", 1.3, FLOOR), 13.1, False),
        (Target("throughput", ">=", 0.9, FLOOR), 1.8, True),
        (Target("throughput", ">=", 0.9, FLOOR), 1.7, False),
        (Target("downtime", "<=", plus=2e-3), 2e-3, True),
        (Target("downtime", "<=", plus=2e-3), 2.1e-3, False),
        (Target("own_bytes", "<=", 1.0, "memory/1GiB", 5.0), 105.0, True),
        (Target("own_bytes", "<=", 1.0, "memory/1GiB", 5.0), 106.0, False),
    ],
)
def test_a_bound_is_so_many_times_something_plus_something(target, value, reached):
    references = {FLOOR: {"fault_p50": 10.0, "throughput": 2.0}, "memory/1GiB": {"own_bytes": 100.0}}
    (verdict,) = judge((target,), {target.figure: value}, references)
    assert verdict.reached is reached
    assert ("MISSED" in str(verdict)) is not reached
    assert verdict.as_map()["reached"] is reached


def test_what_was_not_measured_is_not_judged():
    target = Target("fault_p50", "<=", 1.3, FLOOR)
    for verdict in (*judge((target,), {"fault_p50": 1.0}, {}), *judge((target,), {}, {FLOOR: {"fault_p50": 1.0}})):
        assert verdict.reached is None
        assert "not judged" in str(verdict)


def test_a_target_reads_like_a_sentence():
    assert str(Target("fault_p50", "<=", 1.3, FLOOR)) == "fault p50 ≤ 1.3 x the floor"
    assert str(Target("fault_p99", "<=", plus=2e-3)) == "fault p99 ≤ 2 ms"
    assert str(Target("faults_per_second", ">=", 1.0, "vcpus/2")) == "faults per second ≥ 1 x vcpus/2"
    assert str(Target("own_bytes", "<=", 1.0, "memory/1GiB", 1 << 20)).endswith("≤ 1 x memory/1GiB + 1 MiB")
    assert "reached" in str(Verdict(Target("link_share", ">=", plus=0.9), 0.95, 0.9))


def test_every_figure_has_a_way_to_be_written():
    values = {"throughput": 1e9, "own_bytes": 1e6, "faults_per_second": 1e5, "starvation": 2.0, "link_share": 0.9}
    assert [format_figure(name, value) for name, value in values.items()] == [
        "954 MiB/s",
        "977 KiB",
        "100,000/s",
        "2",
        "90 %",
    ]


EXPECTED = {
    "demand/shmem/auto": ["fault p50 ≤ 1.3 x the floor", "fault p99 ≤ 2 x the floor"],
    "demand/shmem/minor": ["fault p50 ≤ 1.5 x the floor"],
    "demand/shmem/missing": ["fault p50 ≤ 1.5 x the floor"],
    "demand/hugetlb-2M/auto": ["fault p50 ≤ 1.2 x the floor"],
    "mixed/shmem/auto": ["fault p50 ≤ 1.5 x the floor", "fault p99 ≤ 3 x the floor", "stall p99 ≤ 500 µs"],
    "stream/shmem/auto": ["throughput ≥ 0.9 x the floor", "CPU per GiB ≤ 1.2 x the floor"],
    "stream/hugetlb-2M/auto": ["throughput ≥ 0.9 x the floor", "CPU per GiB ≤ 1.2 x the floor"],
    "vcpus/16": ["faults per second ≥ 1 x vcpus/2", "slowest vCPU's p99 to the median one's ≤ 5"],
    "link": ["share of the link ≥ 90 %", "fault p50 ≤ 500 µs", "fault p99 ≤ 2 ms"],
    "size/64MiB": ["downtime ≤ 2 ms"],
    "size/8GiB": ["downtime ≤ 2 ms"],
    "sparse": ["total time ≤ 2 s"],
    "memory/1GiB": ["an agent's own memory ≤ 40 MiB"],
    "memory/4GiB": ["an agent's own memory ≤ 40.8 MiB", "an agent's own memory ≤ 1 x memory/1GiB + 768 KiB"],
}


def test_the_table_of_targets_is_what_it_is():
    found = {one.name: [str(target) for target in one.targets] for one in catalogue(ROOMY)}
    assert {name: found[name] for name in EXPECTED} == EXPECTED
