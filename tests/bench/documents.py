"""Scenarios and runs made up for tests: numbers that nobody measured."""

from __future__ import annotations

from agent.bench.figures import figures_of
from agent.bench.floor import FloorSetup
from agent.bench.machine import Load
from agent.bench.product import ProductSetup
from agent.bench.results import document, results
from agent.bench.runner import Measured, Runs
from agent.bench.scenarios import Scenario
from agent.bench.targets import FLOOR, Target

QUIET = Load(0.0, 0.0, 0.1, 0.2, 0)
LOUD = Load(0.5, 0.0, 2.0, 2.0, 0)


def times(p50):
    return {"count": 500, "p50": p50, "p90": p50 * 2, "p99": p50 * 3, "p999": p50 * 4, "max": p50 * 5, "mean": p50}


def report(p50, throughput=1e9):
    return {
        "schema_version": 1,
        "outcome": "completed",
        "mode": "auto",
        "memory": [{"type": "shmem", "page_size": 4096, "size_bytes": 1 << 30}],
        "downtime_seconds": 0.001,
        "total_seconds": 1.0,
        "resident_seconds": 0.9,
        "fault_latency_seconds": times(p50),
        "stall_seconds": times(p50) | {"sum": p50 * 500},
        "pages": {"total": 500, "demand": 500, "push": 0, "zero": 0, "duplicate": 0},
        "bytes": {"wire": 1, "placed": 1},
        "throughput_bytes_per_second": throughput,
        "cpu_seconds": {"source": 0.5, "destination": 0.5},
        "integrity": {"pages_checked": 500, "pages_mismatched": 0},
        "environment": {"kernel": "x", "cpus": 2, "pinning": "none", "tls": False, "version": "0"},
    }


def runs(p50s, load=QUIET, **extra):
    found = Runs()
    for p50 in p50s:
        account = report(p50) | extra
        found.add(account, figures_of(account), load)
    return found


def scenario(name="demand/shmem/auto", floors=("copy, polls", "copy, blocks"), **changes):
    targets = (Target("fault_p50", "<=", 1.3, FLOOR), Target("fault_p99", "<=", 2.0, FLOOR))
    setups = {floor: FloorSetup(size=1 << 20) for floor in floors}
    return Scenario(name, ProductSetup(), setups, targets, **changes)


def measured(product=(15e-6, 12e-6, 90e-6), load=QUIET):
    floors = {
        "copy, polls": runs([10e-6, 12e-6, 11e-6], way="copy, polls"),
        "copy, blocks": runs([80e-6, 70e-6, 90e-6], way="copy, blocks"),
    }
    return Measured(scenario(), runs(product, load), floors)


def whole(product=(15e-6, 12e-6, 90e-6)):
    return document(results([measured(product)]), {"kernel": "x", "cpus": 2})
