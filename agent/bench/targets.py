"""Targets: what a scenario must reach, and whether it did. Pure; the numbers are written down once, in scenarios.py.

A bound is a number, or so many times the same figure of something else (the floor, another scenario), plus a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agent.bench.figures import FIGURES, Figures
from postcopy.pages.units import format_rate, format_seconds, format_size

FLOOR = "floor"


@dataclass(frozen=True, slots=True)
class Target:
    """`figure` must be at most (or at least) `times` the same figure of `of`, plus `plus`; `of` None: `plus` alone."""

    figure: str
    relation: Literal["<=", ">="]
    times: float = 0.0
    of: str | None = None
    plus: float = 0.0

    def bound(self, references: Mapping[str, Figures]) -> float | None:
        """Return the bound in units of the figure; None where what it refers to was not measured."""
        if self.of is None:
            return self.plus
        reference = references.get(self.of, {}).get(self.figure)
        return None if reference is None else self.times * reference + self.plus

    def __str__(self) -> str:
        words = [] if self.of is None else [f"{self.times:g} x {'the ' if self.of == FLOOR else ''}{self.of}"]
        if self.plus or self.of is None:
            words.append(format_figure(self.figure, self.plus))
        return f"{FIGURES[self.figure][0]} {self.sign} {' + '.join(words)}"

    @property
    def sign(self) -> str:
        """The relation as people write it."""
        return "≤" if self.relation == "<=" else "≥"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target, what was measured, what it is held against; `reached` None: one of the two is missing."""

    target: Target
    value: float | None
    bound: float | None

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached."""
        if self.value is None or self.bound is None:
            return None
        return self.value <= self.bound if self.target.relation == "<=" else self.value >= self.bound

    @property
    def ratio(self) -> float | None:
        """How many times the figure is what it is held against; None where it is held against a number."""
        if self.value is None or self.bound is None or not self.target.times or self.bound <= self.target.plus:
            return None
        return self.value * self.target.times / (self.bound - self.target.plus)

    def as_map(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "text": str(self.target),
            "figure": self.target.figure,
            "value": self.value,
            "bound": self.bound,
            "reached": self.reached,
        }

    def __str__(self) -> str:
        if self.value is None or self.bound is None:
            return f"not judged: {self.target}"
        values = f"{format_figure(self.target.figure, self.value)} of {format_figure(self.target.figure, self.bound)}"
        return f"{'reached' if self.reached else 'MISSED'}: {self.target} ({values})"


def judge(targets: tuple[Target, ...], figures: Figures, references: Mapping[str, Figures]) -> list[Verdict]:
    """Hold a scenario's medians against its targets; `references` has the floor's and other scenarios' by name."""
    return [Verdict(target, figures.get(target.figure), target.bound(references)) for target in targets]


def format_figure(name: str, value: float) -> str:
    """Return a figure as people read it."""
    match name:
        case "throughput":
            return format_rate(value)
        case "own_bytes":
            return format_size(value)
        case "faults_per_second":
            return f"{value:,.0f}/s"
        case "starvation" | "asked_p50" | "asked_p99":
            return f"{value:.3g}"
        case "link_share":
            return f"{100 * value:.0f} %"
        case _:
            return format_seconds(value)
