"""`postcopy bench` as it is typed, on a few MiB: real daemons, a real floor, one pair. No time is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from click.testing import CliRunner

from agent.bench import product, runner
from agent.bench.command import bench
from agent.bench.floor import FloorSetup
from agent.bench.product import ProductSetup
from agent.bench.results import results, wrong
from agent.bench.runner import Bench, Plan
from agent.bench.scenarios import Scenario
from agent.bench.targets import FLOOR, Target
from agent.bench.warm import Warm
from tests.memory_cgroup import memory_cgroup

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20
_BENCH = "from agent.bench.command import bench; bench()"


def test_product_and_floor_in_turns(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    target = Target("fault_p50", "<=", 1e9, FLOOR)
    scenarios = [
        Scenario("tiny/demand", ProductSetup(size=2 * MIB, push=False), {"copy": FloorSetup(2 * MIB)}, (target,)),
        Scenario("tiny/push", ProductSetup(size=2 * MIB), {}, (Target("throughput", ">=", plus=1.0),)),
    ]
    told = []
    measured = Bench(Plan(pairs=1), lambda *now: told.append(now)).run(scenarios)
    assert [one.failures for one in measured] == [[], []]
    demand, push = results(measured)
    assert wrong([demand, push]) == []
    assert demand.report["pages"]["demand"] == demand.report["pages"]["total"] == 512
    assert demand.floor["pages"]["demand"] == 512
    assert demand.ratio["fault_p50"] > 0
    assert [verdict.reached for verdict in (*demand.verdicts, *push.verdicts)] == [True, True]
    assert push.report["integrity"] == {"page_size": 4096, "pages_checked": 512, "pages_mismatched": 0}
    assert [(what, total) for what, _, total in told] == [
        ("tiny/demand: product", 3),
        ("tiny/demand: floor, copy", 3),
        ("tiny/push: product", 3),
    ]


def test_a_scenario_that_fails_does_not_end_the_bench(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    scenarios = [Scenario("tiny/broken", ProductSetup(memory="no-such", size=2 * MIB), {})]
    (measured,) = Bench(Plan(pairs=3), lambda *_: None).run(scenarios)
    assert len(measured.failures) == 2
    assert "no-such" in results([measured])[0].skipped


def test_no_pair_is_begun_without_the_time_for_it():
    scenarios = [Scenario("tiny", ProductSetup(size=2 * MIB), {})]
    (measured,) = Bench(Plan(pairs=3, seconds=0.0), lambda *_: None).run(scenarios)
    assert results([measured])[0].skipped == "there was no time left for it"


def test_a_bench_fits_into_what_its_cgroup_grants():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with memory_cgroup(380 * MIB) as (_, prefix):
        command = [*prefix, sys.executable, "-c", _BENCH, "honest/untouched", "handover/1GiB", "--pairs", "1", "--json"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [one["name"] for one in found["scenarios"]] == ["honest/untouched"]
    assert [one["name"] for one in found["not_run"]] == ["handover/1GiB"]
    assert "of memory are available" in found["not_run"][0]["reason"]


def test_a_run_that_should_have_been_scraped_and_was_not_is_wrong(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(product, "metrics_address", lambda _log: None)
    scenario = Scenario("tiny", ProductSetup(size=2 * MIB, push=False, scrapes_per_second=10_000), {})
    (measured,) = Bench(Plan(pairs=1), lambda *_: None).run([scenario])
    assert measured.failures == []
    (complaint,) = wrong(results([measured]))
    assert "metrics were answered 0 times" in complaint


def test_a_pair_takes_the_time_to_find_its_memory_too(monkeypatch):
    class Slow(Warm):
        def find(self, memory, data, **_):
            nonlocal now
            now += 100.0

    now = 0.0
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(runner, "Warm", Slow)
    scenario = Scenario("tiny", ProductSetup(size=2 * MIB, push=False), {"copy": FloorSetup(2 * MIB)})
    (measured,) = Bench(Plan(pairs=2, seconds=300.0), lambda *_: None).run([scenario])
    assert measured.failures == []
    assert measured.seconds == 200.0
    assert len(measured.product.figures) == 1, "there was no time for another one"


def test_the_command_prints_one_object_and_compares_with_it(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _BENCH, "honest", "--pairs", "1", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [one["name"] for one in found["scenarios"]] == ["honest/untouched", "honest/touched"]
    untouched, touched = found["scenarios"]
    assert untouched["report"]["pages"]["demand"] == 0
    assert touched["report"]["pages"]["demand"] > 0
    assert found["environment"]["cpus"] == len(os.sched_getaffinity(0))
    (tmp_path / "before.json").write_text(ended.stdout)
    listed = CliRunner().invoke(bench, ["--list", "--compare", str(tmp_path / "before.json"), "demand/shmem"])
    assert listed.exit_code == 0
    assert listed.output.splitlines() == ["demand/shmem/auto", "demand/shmem/minor", "demand/shmem/missing"]
