"""Comparing with an earlier bench: what is better, what is worse, and what is another machine."""

from __future__ import annotations

import json

import pytest

from agent.bench.compare import Change, compare, read_document, same_machine
from postcopy.errors import UsageError
from tests.bench.documents import whole


def test_figures_of_scenarios_that_both_have_are_compared():
    changes = {one.figure: one for one in compare(whole(), whole(product=(30e-6,)))}
    assert changes["fault_p50"].before == 15e-6
    assert changes["fault_p50"].after == 30e-6
    assert changes["fault_p50"].change == pytest.approx(1.0)
    assert changes["fault_p50"].ratio_after == pytest.approx(30 / 11)
    assert changes["fault_p50"].verdict == "worse"
    assert changes["cpu"].verdict == "same"
    assert changes["downtime"].ratio_before is None


def test_a_scenario_that_is_new_is_not_compared():
    earlier = whole()
    earlier["scenarios"][0]["name"] = "gone"
    assert compare(earlier, whole()) == []


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (Change("s", "fault_p50", 10.0, 10.9, None, None), "same"),
        (Change("s", "fault_p50", 10.0, 11.2, None, None), "worse"),
        (Change("s", "fault_p50", 10.0, 8.0, None, None), "better"),
        (Change("s", "throughput", 10.0, 8.0, None, None), "worse"),
        (Change("s", "throughput", 10.0, 12.0, None, None), "better"),
        # The machine became slower, the product did not.
        (Change("s", "fault_p50", 10.0, 20.0, 1.2, 1.2), "same"),
        (Change("s", "fault_p50", 10.0, 10.0, 1.2, 1.4), "worse"),
        (Change("s", "downtime", 0.0, 1.0, None, None), "same"),
    ],
)
def test_the_ratio_to_the_floor_decides_where_there_is_one(change, verdict):
    assert change.verdict == verdict
    assert change.as_map()["verdict"] == verdict


def test_another_machine_is_named():
    earlier, later = whole(), whole()
    assert same_machine(earlier, later) == []
    earlier["environment"]["kernel"] = "old"
    assert same_machine(earlier, later) == ["kernel: old then, x now"]


def test_a_file_is_read_back(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(whole()))
    assert read_document(path) == json.loads(json.dumps(whole()))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2, "scenarios": []}', '{"schema_version": 1}'])
def test_what_is_no_bench_is_refused(tmp_path, text):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"bench\.json"):
        read_document(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_document(tmp_path / "none.json")
