"""From runs to results: medians, the floor among the floors, ratios, verdicts; and the one object that `--json` prints.

Pure: measured runs enter, plain data leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.bench.figures import Figures, best, medians, middle_run, ratios
from agent.bench.runner import Measured
from agent.bench.scenarios import Scenario
from agent.bench.targets import FLOOR, Verdict, judge

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Result:
    """One scenario's outcome. `report` and `floor` are whole accounts of the median runs, None where there was none."""

    name: str
    report: dict[str, Any] | None
    floor: dict[str, Any] | None
    product_medians: dict[str, float]
    floor_medians: dict[str, float] | None
    floors: dict[str, dict[str, float]]  # medians of every floor that was tried, by name
    ratio: dict[str, float | None]
    pairs: int
    disturbed: int
    loads: list[dict[str, Any]]
    verdicts: list[Verdict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: str | None = None

    def as_map(self) -> dict[str, Any]:
        """Return it as `--json` shows it."""
        return {
            "name": self.name,
            "floor": self.floor,
            "report": self.report,
            "ratio": self.ratio,
            "medians": {"product": self.product_medians, "floor": self.floor_medians, "floors": self.floors},
            "targets": [verdict.as_map() for verdict in self.verdicts],
            "pairs": self.pairs,
            "disturbed": self.disturbed,
            "loads": self.loads,
            "problems": self.problems,
        }


def results(measured: Sequence[Measured]) -> list[Result]:
    """Return one result for each scenario that was measured; targets may refer to other scenarios by name."""
    of_product = {one.scenario.name: _about(one.scenario, medians(one.product.figures)) for one in measured}
    return [_result(one, of_product) for one in measured]


def _result(one: Measured, of_product: Mapping[str, Figures]) -> Result:
    scenario = one.scenario
    if not one.product.figures:
        return left_out(scenario, "; ".join(one.failures) or "there was no time left for it")
    product = dict(of_product[scenario.name])
    floors = {name: _about(scenario, medians(runs.figures)) for name, runs in one.floors.items() if runs.figures}
    name = best(floors, scenario.by) if floors else None
    floor = floors[name] if name is not None else None
    references = {**of_product, **({FLOOR: floor} if floor is not None else {})}
    report = one.product.accounts[middle_run(one.product.figures, scenario.middle)]
    account = None
    if name is not None:
        runs = one.floors[name]
        account = runs.accounts[middle_run(runs.figures, scenario.middle)]
    return Result(
        name=scenario.name,
        report=report,
        floor=account,
        product_medians=product,
        floor_medians=floor,
        floors=floors,
        ratio=ratios(product, floor),
        pairs=len(one.product.figures),
        disturbed=one.disturbed,
        loads=_loads(one),
        verdicts=judge(scenario.targets, product, references),
        problems=[*one.problems, *one.failures],
    )


def _about(scenario: Scenario, figures: Figures) -> dict[str, float]:
    """Keep the figures that the scenario is about."""
    return {name: value for name, value in figures.items() if name in scenario.figures}


def _loads(one: Measured) -> list[dict[str, Any]]:
    kinds = {"product": one.product, **one.floors}
    return [
        {
            "of": kind,
            "others": round(load.others, 4),
            "steal": round(load.steal, 4),
            "load_before": load.before,
            "load_after": load.after,
            "involuntary_switches": load.involuntary_switches,
            "disturbed": load.disturbed,
        }
        for kind, runs in kinds.items()
        for load in runs.loads
    ]


def left_out(scenario: Scenario, reason: str) -> Result:
    """Return the result of a scenario that was not measured; its targets are not judged."""
    verdicts = [Verdict(target, None, None) for target in scenario.targets]
    return Result(scenario.name, None, None, {}, None, {}, ratios({}, None), 0, 0, [], verdicts, [], reason)


def document(found: Sequence[Result], environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the one object of `bench --json`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": dict(environment),
        "scenarios": [result.as_map() for result in found if result.skipped is None],
        "not_run": [{"name": result.name, "reason": result.skipped} for result in found if result.skipped is not None],
    }


def wrong(found: Sequence[Result]) -> list[str]:
    """Return what no run may have: a byte that differs, counters that contradict each other, a run that failed."""
    return [f"{result.name}: {problem}" for result in found for problem in result.problems]
