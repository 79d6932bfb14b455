"""Compares a bench with an earlier one of the same schema. Pure: two documents in, rows out.

Absolute figures move with the machine; ratios to the floor of the same run move with the product. Both are shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.bench.figures import FIGURES, RATIOS
from agent.bench.results import SCHEMA_VERSION
from postcopy.errors import UsageError

# Medians of five runs on a quiet machine come back within this.
NOTABLE = 0.10


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one scenario, then and now; `ratio_*` are to the floor of its own run, None where there is none."""

    scenario: str
    figure: str
    before: float
    after: float
    ratio_before: float | None
    ratio_after: float | None

    @property
    def change(self) -> float:
        """Return how much of the figure was added: 0.1 is ten per cent more."""
        return self.after / self.before - 1 if self.before else 0.0

    @property
    def verdict(self) -> str:
        """Return "better" or "worse" beyond the noise, else "same"; by the ratio to the floor where there is one."""
        before, after = self.before, self.after
        if self.ratio_before and self.ratio_after:
            before, after = self.ratio_before, self.ratio_after
        if not before or abs(after / before - 1) <= NOTABLE:
            return "same"
        return "better" if (after > before) == (FIGURES[self.figure][1] == "more") else "worse"

    def as_map(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "scenario": self.scenario,
            "figure": self.figure,
            "before": self.before,
            "after": self.after,
            "ratio_before": self.ratio_before,
            "ratio_after": self.ratio_after,
            "verdict": self.verdict,
        }


def read_document(path: Path) -> dict[str, Any]:
    """Read what an earlier `bench --json` wrote; UsageError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION or "scenarios" not in found:
        raise UsageError(f"{path} is no result of `postcopy bench --json` of schema {SCHEMA_VERSION}")
    return found


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Return a change for each figure that both documents have, in the order of the later one."""
    then = {one["name"]: one for one in before["scenarios"]}
    changes = []
    for now in after["scenarios"]:
        earlier = then.get(now["name"])
        if earlier is None:
            continue
        old, new = earlier["medians"]["product"], now["medians"]["product"]
        for figure in FIGURES:
            if figure in old and figure in new:
                ratio = [one["ratio"].get(figure) if figure in RATIOS else None for one in (earlier, now)]
                changes.append(Change(now["name"], figure, old[figure], new[figure], ratio[0], ratio[1]))
    return changes


def same_machine(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return in what the two environments differ, so that nobody compares two machines unawares."""
    then, now = before.get("environment", {}), after.get("environment", {})
    return [f"{key}: {then[key]} then, {now[key]} now" for key in now if key in then and then[key] != now[key]]
