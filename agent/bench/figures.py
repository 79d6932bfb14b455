"""Figures: what one run is reduced to, and the arithmetic on several runs. Pure: numbers in, numbers out.

A run's figures are a map from a name of FIGURES to a number in SI base units; a run that cannot tell one leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Literal

Figures = Mapping[str, float]

# name -> what it is, for headings and the comparison; "more" or "less" of it is better.
FIGURES: dict[str, tuple[str, Literal["more", "less"]]] = {
    "fault_p50": ("fault p50", "less"),
    "fault_p99": ("fault p99", "less"),
    "stall_p50": ("stall p50", "less"),
    "stall_p99": ("stall p99", "less"),
    "throughput": ("throughput", "more"),
    "cpu": ("CPU per GiB", "less"),
    "faults_per_second": ("faults per second", "more"),
    "starvation": ("slowest vCPU's p99 to the median one's", "less"),
    "link_share": ("share of the link", "more"),
    "downtime": ("downtime", "less"),
    "total": ("total time", "less"),
    "own_bytes": ("an agent's own memory", "less"),
    "asked_p50": ("fault p50 while metrics are asked for, by that while not", "less"),
    "asked_p99": ("fault p99 while metrics are asked for, by that while not", "less"),
}
RATIOS = ("fault_p50", "fault_p99", "throughput", "cpu")
_GIB = 1 << 30


def figures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Reduce a report of a migration, or a floor's account of the same shape, to figures."""
    figures: dict[str, float] = {}
    for name, key in (("fault", "fault_latency_seconds"), ("stall", "stall_seconds")):
        times = report[key]
        if times["count"]:
            figures[f"{name}_p50"], figures[f"{name}_p99"] = times["p50"], times["p99"]
    size = sum(region["size_bytes"] for region in report["memory"])
    figures["throughput"] = report["throughput_bytes_per_second"]
    figures["cpu"] = sum(report["cpu_seconds"].values()) * _GIB / size
    if report["resident_seconds"] > 0:
        figures["faults_per_second"] = report["fault_latency_seconds"]["count"] / report["resident_seconds"]
    for name, key in (("downtime", "downtime_seconds"), ("total", "total_seconds")):
        if key in report:
            figures[name] = report[key]
    return figures


def starvation(p99_per_vcpu: Sequence[float]) -> float:
    """Return the slowest thread's p99 as a multiple of the median thread's; 1.0 where nobody waited."""
    middle = median(p99_per_vcpu)
    return max(p99_per_vcpu) / middle if middle > 0 else 1.0


def medians(runs: Sequence[Figures]) -> dict[str, float]:
    """Return the median of each figure over the runs that have it."""
    names = [name for name in FIGURES if any(name in run for run in runs)]
    return {name: median(run[name] for run in runs if name in run) for name in names}


def ratios(product: Figures, floor: Figures | None) -> dict[str, float | None]:
    """Return product / floor for each name of RATIOS, None where either lacks it or the floor is zero."""
    floor = floor or {}
    return {name: product[name] / floor[name] if name in product and floor.get(name) else None for name in RATIOS}


def better(name: str, one: float, other: float) -> bool:
    """Return whether `one` is a better value of a figure than `other`."""
    return one > other if FIGURES[name][1] == "more" else one < other


def merit(figures: Figures, by: Iterable[str]) -> float:
    """Return one number that is the smaller the better a run was in all of `by`: their product; inf where one lacks."""
    number = 1.0
    for name in by:
        value = figures.get(name)
        if not value:
            return float("inf")
        number *= 1 / value if FIGURES[name][1] == "more" else value
    return number


def best(candidates: Mapping[str, Figures], by: Sequence[str]) -> str:
    """Return the name of the candidate with the best figures of `by`; the first of equals."""
    return min(candidates, key=lambda name: merit(candidates[name], by))


def middle_run(runs: Sequence[Figures], by: str) -> int:
    """Return the index of the run whose figure `by` is the median one (the lower of two); 0 where none has it."""
    having = sorted((index for index, run in enumerate(runs) if by in run), key=lambda index: runs[index][by])
    return having[(len(having) - 1) // 2] if having else 0
