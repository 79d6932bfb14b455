"""The floor on real memory and real sockets, tiny: every way of placing keeps the bytes right and the counts honest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.bench.floor import FloorSetup, run_floor
from postcopy.errors import HostError

MIB = 1 << 20
HUGE = 2 * MIB


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent.parent))


def run(**setup):
    """Run a floor and check what holds of every one."""
    result = run_floor(FloorSetup(**setup), deadline=20)
    assert result.pages_checked > 0
    assert result.pages_mismatched == 0
    assert result.wall_seconds > 0
    assert result.latency.count == result.pages_demand
    return result


@pytest.mark.parametrize("poll_ns", [0, 200_000])
@pytest.mark.parametrize("way", ["copy", "continue"])
def test_demand_without_a_push_brings_what_is_touched_and_nothing_else(way, poll_ns):
    result = run(size=MIB, touches=100, demand=way, poll_ns=poll_ns)
    assert result.pages_demand == result.pages_touched == result.pages_resident == result.pages_checked == 100
    assert result.stall.count >= 100
    assert result.bytes_wire == 100 * (4096 + 24)
    assert result.source_cpu_seconds > 0
    assert result.destination_cpu_seconds > 0


def test_many_touchers_share_pages():
    result = run(size=MIB, touchers=4, touches=200)
    assert len(result.stall_per_toucher) == 4
    assert result.pages_demand == result.pages_touched == result.pages_resident
    assert 200 <= result.pages_touched <= 256


def test_touches_can_be_paced():
    result = run(size=MIB, touches=5, period_ns=2_000_000)
    assert result.wall_seconds >= 0.01
    assert result.pages_touched == 5


@pytest.mark.parametrize("way", ["copy", "continue", "write"])
def test_a_push_brings_everything(way):
    result = run(size=2 * MIB, touchers=0, push=way)
    assert result.pages_push == result.pages_resident == result.pages_checked == 512
    assert result.pages_demand == 0
    assert result.bytes_wire == 2 * MIB + 8 * 24


@pytest.mark.parametrize("way", ["copy", "continue"])
@pytest.mark.parametrize("demand", ["copy", "continue"])
def test_demand_and_push_race_for_each_page_and_one_wins(demand, way):
    result = run(size=4 * MIB, touchers=2, demand=demand, push=way, frame_bytes=64 * 1024)
    assert result.pages_demand + result.pages_push == result.pages_resident == result.pages_checked == 1024


@pytest.mark.parametrize("way", ["copy", "continue"])
def test_huge_pages(huge_pages, way):
    huge_pages("hugetlb-2M", 8)
    demanded = run(size=4 * HUGE, page_size=HUGE, demand=way)
    assert demanded.pages_demand == demanded.pages_touched == demanded.pages_resident == 4
    mixed = run(size=4 * HUGE, page_size=HUGE, demand=way, push=way)
    assert mixed.pages_demand + mixed.pages_push == mixed.pages_resident == 4


def test_both_ends_can_be_pinned():
    cpu = min(os.sched_getaffinity(0))
    assert run(size=MIB, touches=20, source_cpus=1 << cpu, destination_cpus=1 << cpu).pages_demand == 20


def test_a_host_that_cannot_is_said():
    with pytest.raises(HostError, match="sched_setaffinity"):
        run_floor(FloorSetup(size=MIB, destination_cpus=1 << 63), deadline=20)
    with pytest.raises(HostError, match="no/such"):
        run_floor(FloorSetup(size=MIB, source_netns="/no/such"), deadline=20)


def test_a_floor_that_does_not_end_is_ended():
    with pytest.raises(HostError, match="did not end"):
        run_floor(FloorSetup(size=MIB, touches=100, period_ns=1_000_000_000), deadline=1.0)
