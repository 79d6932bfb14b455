"""The dashboard by itself: Grafana knows its fields, people its words, and nothing it draws is lost in gaps."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from postcopy.session.states import State
from tests.deploy.dashboard import DASHBOARD, expressions, panels, with_values
from tests.programs import say


def test_the_dashboard_hangs_together() -> None:
    found = panels()
    assert len({one["id"] for one in found}) == len(found)
    assert len({one["title"] for one in found}) == len(found)
    for one in found:
        place = one["gridPos"]
        assert place["x"] + place["w"] <= 24
        for other in found:
            there = other["gridPos"]
            beside = place["x"] >= there["x"] + there["w"] or there["x"] >= place["x"] + place["w"]
            above = place["y"] >= there["y"] + there["h"] or there["y"] >= place["y"] + place["h"]
            assert one is other or beside or above, (one["title"], other["title"])
    assert "$" not in "".join(with_values(expression) for _, expression in expressions())


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """Grafana's own models take it in and say it again: what they do not know, a slip of the pen, would be gone."""
    register_default_plugins()
    written = json.loads(DASHBOARD.read_text())
    said = json.loads(JSONEncoder().encode(Dashboard.from_json(json.loads(DASHBOARD.read_text()))))
    assert set(changed(written, said)) == {
        # What Grafana itself writes beside a variable's query, and what its Prometheus reads of an annotation.
        "/templating/list/1/definition", "/templating/list/2/definition",
        "/annotations/list/0/titleFormat", "/annotations/list/0/textFormat", "/annotations/list/0/step",
    }  # fmt: skip
    written["panels"][1]["fieldConfig"]["defaults"]["untis"] = "s"
    assert "/panels/1/fieldConfig/defaults/untis" in set(changed(written, said))


def changed(written: Any, said: Any, path: str = "") -> Iterator[str]:
    """Yield where something that was written is not said, or is said otherwise."""
    if isinstance(written, dict) and isinstance(said, dict):
        for key, one in written.items():
            yield from changed(one, said.get(key), f"{path}/{key}")
    elif isinstance(written, list) and isinstance(said, list) and len(written) == len(said):
        for index, (one, other) in enumerate(zip(written, said, strict=True)):
            yield from changed(one, other, f"{path}/{index}")
    elif written != said:
        yield path


def test_every_panel_says_what_it_shows() -> None:
    """In words and with a unit; what is drawn over time has names, and begins at nothing unless its scale has none."""
    for one in panels():
        if one["type"] == "row":
            continue
        assert one["description"].endswith("."), one["title"]
        shown, how = one["fieldConfig"]["defaults"], one["fieldConfig"]["defaults"].get("custom", {})
        if one["type"] == "timeseries":
            logarithmic = how.get("scaleDistribution", {}).get("type") == "log"
            assert "unit" in shown, one["title"]
            assert logarithmic or shown["min"] == 0, one["title"]
            assert all(target["legendFormat"] for target in one["targets"]), one["title"]
            assert one["options"]["legend"]["calcs"] == ["lastNotNull", "max"], one["title"]
        elif one["type"] == "stat":
            assert "unit" in shown or "mappings" in shown or "count" in one["description"], one["title"]
        # What asks for more than zero, or for a part of nothing, has a word for a range without any.
        sifts = any(re.search(r"[^=]> 0", target["expr"]) for target in one["targets"])
        assert "noValue" in shown or not (sifts or "histogram" in str(one["targets"])), one["title"]


def test_the_dashboard_has_a_word_and_a_colour_for_each_state() -> None:
    (panel,) = [one for one in panels() if one["title"] == "State"]
    numbers = {
        state: number for number, state in re.findall(r'(\d+) \* \w+{state="([\w-]+)"', panel["targets"][0]["expr"])
    }
    assert set(numbers) == set(State)
    shown = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    assert {one["text"]: number for number, one in shown.items()} == numbers
    assert len({one["color"] for one in shown.values()}) == len(State)


# --- what is drawn of given samples, five seconds apart: after a scrape that failed, what came before it is stale -----


def check(folder: Path, series: dict[str, str], expression: str, found: dict[str, float]) -> None:
    """Have promtool see that an expression has these samples, a minute after those of the series began."""
    test = {
        "interval": "5s",
        "input_series": [{"series": one, "values": values} for one, values in series.items()],
        "promql_expr_test": [
            {
                "expr": expression,
                "eval_time": "1m",
                "exp_samples": [{"labels": labels, "value": value} for labels, value in found.items()],
            }
        ],
    }
    file = folder / "tests.yml"
    file.write_text(json.dumps({"evaluation_interval": "5s", "tests": [test]}))  # which is YAML, too
    done = say("promtool", "test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("step", ["5s", "10s"])
@pytest.mark.parametrize(
    ("values", "count"),
    [
        ("0 0 stale 3 3 3", 3),
        ("0 0 0 3 stale 3 3 3", 3),  # between two bars of ten seconds, and then there is nothing at the second
        ("0 0 stale stale 3 stale 4 4", 4),
        ("5 5 stale 0 0 0", 0),  # another process
    ],
)
@pytest.mark.parametrize("metric", ["postcopy_reconnects_total", "postcopy_uffd_retries_total"])
def test_nothing_that_is_counted_is_lost_with_a_scrape(
    metric: str, values: str, count: int, step: str, tmp_path: Path
) -> None:
    (asked,) = [asked for title, asked in expressions() if title.startswith("Connections made") and metric in asked]
    altogether = f"sum_over_time(({with_values(asked, step)})[1m:{step}])"
    check(tmp_path, {f'{metric}{{job="j", instance="a"}}': values}, altogether, {'{instance="a"}': count})


@pytest.mark.parametrize("step", ["5s", "10s"])
@pytest.mark.parametrize(
    ("values", "count"),
    [("1 1 stale 0 0 0", 1), ("0 0 0 1 stale 1 1 1", 1), ("0 0 stale 1 1 stale 0 0", 2), ("1 1 stale 1 1 1", 0)],
)
def test_no_switchover_is_lost_with_a_scrape(values: str, count: int, step: str, tmp_path: Path) -> None:
    (asked,) = [asked for title, asked in expressions() if title == "Switchover"]
    marks = f"count_over_time(({with_values(asked, step)})[1m:{step}])"
    agent = '{instance="a", job="j"}'
    check(tmp_path, {f"postcopy_guest_owned{agent}": values}, marks, {agent: count} if count else {})


def test_what_one_side_alone_counts_is_shown_as_at_least_so_many(tmp_path: Path) -> None:
    counted = {("source", "completed"): 3, ("destination", "completed"): 3}
    counted |= {("source", "failed"): 2, ("destination", "failed"): 1}
    series = {
        f'postcopy_migrations_total{{job="j", instance="{role}", role="{role}", outcome="{outcome}"}}': f"0x5 {count}x5"
        for (role, outcome), count in counted.items()
    }
    (panel,) = [one for one in panels() if one["title"] == "Migrations in this range"]
    shown = {'{outcome="completed"}': 3, '{outcome="failed"}': 2}
    check(tmp_path, series, with_values(panel["targets"][0]["expr"]), shown)
    assert "at least" in panel["description"]
