"""From runs to the one object of `--json`: its keys, its medians, the floor it chose, and what was left out."""

from __future__ import annotations

import json

import pytest

from agent.bench.results import document, left_out, results, wrong
from agent.bench.runner import Measured
from tests.bench.documents import LOUD, measured, scenario, whole


def test_the_document_has_the_keys_that_programs_read():
    found = json.loads(json.dumps(whole()))
    assert found["schema_version"] == 1
    (one,) = found["scenarios"]
    assert one["name"] == "demand/shmem/auto"
    assert set(one["ratio"]) == {"fault_p50", "fault_p99", "throughput", "cpu"}
    assert one["report"]["schema_version"] == 1
    pages = one["report"]["pages"]
    assert pages["demand"] + pages["push"] + pages["zero"] == pages["total"]
    for key in ("fault_latency_seconds", "stall_seconds", "throughput_bytes_per_second", "cpu_seconds"):
        assert key in one["floor"]
    assert set(one) == {
        *("name", "floor", "report", "ratio"),
        *("medians", "targets", "pairs", "disturbed", "loads", "problems"),
    }


def test_medians_meet_the_best_floor():
    (result,) = results([measured()])
    assert result.pairs == 3
    assert result.product_medians["fault_p50"] == 15e-6
    assert result.floor["way"] == "copy, polls"
    assert result.floor_medians["fault_p50"] == 11e-6
    assert set(result.floors) == {"copy, polls", "copy, blocks"}
    assert result.ratio["fault_p50"] == pytest.approx(15 / 11)
    assert result.ratio["throughput"] == 1.0
    assert [verdict.reached for verdict in result.verdicts] == [False, True]


def test_the_report_is_of_a_real_run():
    (result,) = results([measured()])
    assert result.report["fault_latency_seconds"]["p50"] == 15e-6
    assert result.report["stall_seconds"]["sum"] == 15e-6 * 500


def test_disturbed_runs_are_counted_and_shown():
    (result,) = results([measured(load=LOUD)])
    assert result.disturbed == 3
    assert [load["disturbed"] for load in result.loads if load["of"] == "product"] == [True] * 3
    assert len(result.loads) == 9


def test_what_was_not_run_says_why_and_judges_nothing():
    failed = Measured(scenario(), failures=["no huge pages"])
    (result,) = results([failed])
    assert result.skipped == "no huge pages"
    for one in (result, left_out(scenario(), "no time")):
        assert one.report is None
        assert {verdict.reached for verdict in one.verdicts} == {None}
        found = json.loads(json.dumps(document([one], {})))
        assert found["scenarios"] == []
        assert found["not_run"] == [{"name": "demand/shmem/auto", "reason": one.skipped}]


def test_a_failed_run_beside_good_ones_is_a_problem():
    one = measured()
    one.failures.append("the migration broke")
    found = results([one])
    assert found[0].pairs == 3
    assert wrong(found) == ["demand/shmem/auto: the migration broke"]
    assert wrong(results([measured()])) == []
