"""The dashboard that is shipped: its panels, and what it asks a Prometheus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parents[2] / "deploy/grafana/postcopy.json"
VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$job": ".*", "$instance": ".*"}


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> list[tuple[str, str]]:
    """Return title and expression of all that the dashboard asks."""
    asked = [(one["title"], target["expr"]) for one in panels() for target in one.get("targets", [])]
    dashboard = json.loads(DASHBOARD.read_text())
    asked += [(one["name"], one["expr"]) for one in dashboard["annotations"]["list"]]
    for one in dashboard["templating"]["list"]:
        if one["type"] == "query":
            asked.append((one["name"], one["definition"].removeprefix("label_values(").rpartition(",")[0]))
    return asked


def with_values(expression: str, interval: str = "5s") -> str:
    """Return an expression as Grafana asks it, for bars of this width."""
    for variable, value in {**VARIABLES, "$__interval": interval}.items():
        expression = expression.replace(variable, value)
    return expression
