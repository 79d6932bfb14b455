"""A migration in windows: which faults count as those while metrics were asked for, and what is made of them."""

from __future__ import annotations

import json
import struct

import pytest

from agent.bench.product import ProductSetup
from agent.bench.runner import Bench, Plan
from agent.bench.scenarios import Scenario
from agent.bench.scrape import Scraped
from agent.bench.windows import FAULTS_MIN, SETTLED_NS, WINDOW_NS, figures_of_windows, halves
from postcopy.errors import HostError
from tests.bench.test_end_to_end import ROOT

ODD, EVEN = 41, 42
MIB = 1 << 20
BOTH = Scraped(since_ns=ODD * WINDOW_NS, until_ns=(EVEN + 1) * WINDOW_NS)


def traced(faults, began_ns=38 * WINDOW_NS, lost=0):
    """The file of a trace; each fault is (CLOCK_MONOTONIC, latency), in nanoseconds."""
    head = {"schema_version": 1, "faults": len(faults), "lost": lost, "began_ns": began_ns, "regions": []}
    records = (struct.pack("<IIQ", (at - began_ns) // 1000, latency, 0) for at, latency in faults)
    return json.dumps(head).encode() + b"\n" + b"".join(records)


def test_a_fault_is_of_its_window_once_that_has_settled():
    last = WINDOW_NS - 1000
    faults = [
        (ODD * WINDOW_NS + SETTLED_NS - 1000, 1),
        (ODD * WINDOW_NS + SETTLED_NS, 2),
        (ODD * WINDOW_NS + last, 3),
        (EVEN * WINDOW_NS, 4),
        (EVEN * WINDOW_NS + SETTLED_NS, 5),
        (EVEN * WINDOW_NS + last, 6),
    ]
    assert halves(traced(faults), BOTH) == ([2, 3], [5, 6])


@pytest.mark.parametrize(
    ("since", "until", "windows"),
    [
        (ODD * WINDOW_NS, (EVEN + 1) * WINDOW_NS, [ODD, EVEN]),
        (ODD * WINDOW_NS - 1, (EVEN + 2) * WINDOW_NS - 1, [ODD, EVEN]),
        (ODD * WINDOW_NS + 1, (EVEN + 3) * WINDOW_NS, [EVEN, EVEN + 1]),
        (ODD * WINDOW_NS, (EVEN + 3) * WINDOW_NS, [ODD, EVEN, EVEN + 1, EVEN + 2]),
        (ODD * WINDOW_NS, (EVEN + 1) * WINDOW_NS - 1, []),
    ],
)
def test_only_whole_windows_count_as_many_of_either_sort(since, until, windows):
    faults = [(number * WINDOW_NS + SETTLED_NS, number) for number in range(ODD - 2, EVEN + 5)]
    asked, alone = halves(traced(faults), Scraped(since_ns=since, until_ns=until))
    assert sorted(asked + alone) == windows
    assert [number % 2 for number in asked] == [1] * (len(windows) // 2)


def test_a_trace_that_lacks_faults_is_none_of_whole_windows():
    with pytest.raises(HostError, match="3 faults did not fit"):
        halves(traced([(ODD * WINDOW_NS + SETTLED_NS, 1)], lost=3), BOTH)


def of_window(window, latencies):
    return [(window * WINDOW_NS + SETTLED_NS + 1000 * index, one) for index, one in enumerate(latencies)]


def test_both_halves_are_held_against_each_other(tmp_path):
    alone = [1000 + index for index in range(FAULTS_MIN)]
    slow = [*alone[: -FAULTS_MIN // 50], *(2 * one for one in alone[-FAULTS_MIN // 50 :])]
    file = tmp_path / "faults"
    file.write_bytes(traced([*of_window(ODD, slow), *of_window(EVEN, alone)]))
    figures = figures_of_windows(file, BOTH)
    assert figures["asked_p50"] == 1.0
    assert figures["asked_p99"] == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("few", [ODD, EVEN])
def test_few_faults_say_nothing(tmp_path, few):
    file = tmp_path / "faults"
    many = ODD + EVEN - few
    file.write_bytes(traced([*of_window(few, [1000] * (FAULTS_MIN - 1)), *of_window(many, [1000] * FAULTS_MIN)]))
    with pytest.raises(HostError, match=f"too few faults.*{FAULTS_MIN - 1} while"):
        figures_of_windows(file, BOTH)


def test_a_real_migration_is_asked_in_windows(monkeypatch):
    """Its guest's faults are spread over some windows; and whoever asks, asks at about the rate that was asked for."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    setup = ProductSetup(size=96 * MIB, push=False, steps_per_second=12_000, scrapes_per_second=10, windows=True)
    (measured,) = Bench(Plan(pairs=1), lambda *_: None).run([Scenario("windows", setup, {})])
    assert (measured.failures, measured.problems) == ([], [])
    (figures,) = measured.product.figures
    assert {"asked_p50", "asked_p99"} <= figures.keys()
