"""Reports as files hold them, made ready to be shown: read, judged, and put side by side. Pure but for the reading."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from agent.report.fields import UnfitError, at, check_fields, count_of
from postcopy.errors import PostcopyError, UsageError
from postcopy.link.report import SCHEMA_VERSION, checked, with_check
from postcopy.pages.units import format_rate, format_seconds, format_size

PATHS = ("demand", "push", "zero", "handed_over")
PARTS = ("request", "answer", "source", "wire", "place")
PERCENTILES = (("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("p999", "p99.9"), ("max", "max"))


@dataclass(frozen=True, slots=True)
class Run:
    """One migration: its name on the page, and its report."""

    name: str
    report: dict[str, Any]

    @property
    def course(self) -> dict[str, list[float]]:
        """Columns over time, empty where the report has none."""
        found: dict[str, list[float]] = self.report.get("details", {}).get("course") or {}
        return found if found.get("seconds") else {}

    def tail(self, what: str) -> list[tuple[float, float]]:
        """Return (seconds, part of all values that are longer) of `fault_latency` or `stall`, the shortest first."""
        found = self.report.get("details", {}).get(what) or {"upper_seconds": [], "counts": []}
        total = sum(found["counts"])
        longer = (1 - below / total for below in accumulate(found["counts"]))
        return list(zip(found["upper_seconds"], longer, strict=True)) if total else []

    def throughput(self) -> list[tuple[float, float]]:
        """Return (seconds, bytes a second since the look before)."""
        course = self.course
        rows = list(zip([0.0, *course.get("seconds", [])], [0.0, *course.get("received_bytes", [])], strict=True))
        return [
            (at, (bytes_now - bytes_then) / (at - then))
            for (then, bytes_then), (at, bytes_now) in pairwise(rows)
            if at > then
        ]

    def fault_parts(self) -> dict[str, float]:
        """Return of what the mean time of a fault that fetched its page is made, in seconds: {} where nobody knows.

        `wake` is what the guest's clock felt of all faults beyond the agent's: it includes their raising.
        """
        told = self.report.get("details", {}).get("fault_parts_seconds") or {}
        parts = {name: told[name] for name in PARTS if name in told}
        fault, stall = self.report["fault_latency_seconds"], self.report["stall_seconds"]
        if parts and stall["count"]:
            beyond = stall["mean"] * stall["count"] - fault["mean"] * fault["count"]
            parts["wake"] = max(0.0, beyond / stall["count"])
        return parts


def read_runs(files: Sequence[Path]) -> list[Run]:
    """Read reports, each as `demo --json` or `migrate --json` printed it; UsageError for anything else."""
    names = [file.stem if [one.stem for one in files].count(file.stem) == 1 else str(file) for file in files]
    return [Run(name, read_report(file)) for name, file in zip(names, files, strict=True)]


def read_checks(runs: Sequence[Run], files: Sequence[Path]) -> list[Run]:
    """Return the runs with the verdicts of checks, the first run's first, each as `check --json` printed it."""
    if len(files) > len(runs):
        raise UsageError(f"--check {files[len(runs)]}: there are {len(runs)} runs, and a check for each at most")
    checked_ones = [
        Run(run.name, with_check(run.report, *read_check(file))) for run, file in zip(runs, files, strict=False)
    ]
    return [*checked_ones, *runs[len(files) :]]


def read_check(file: Path) -> tuple[int, int]:
    """Read one verdict: pages checked and pages that differ."""
    found = read_json(file, "a check")
    if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION or "pages_checked" not in found:
        raise UsageError(f"{file} is no verdict of a check: postcopy check --json prints one")
    try:
        checked_pages, wrong = (int(count_of(name, at(found, name))) for name in ("pages_checked", "pages_mismatched"))
    except UnfitError as error:
        raise UsageError(f"{file}: {error}") from error
    return checked_pages, wrong


def read_json(file: Path, what: str) -> Any:
    """Read a file of JSON; UsageError for anything else."""
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=no_number)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not the JSON of {what}: it is not text in UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"{file} is not the JSON of {what}: it breaks off or goes wrong at {where}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not the JSON of {what}: {error}") from error


def read_report(file: Path) -> dict[str, Any]:
    """Read one report."""
    found = read_json(file, "a report")
    if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION or "outcome" not in found:
        raise UsageError(f"{file} is no report of a migration: postcopy demo --json or migrate --json prints one")
    if found["outcome"] != "completed":
        raise UsageError(f"{file}: this migration did not come through: {found.get('error', found['outcome'])}")
    try:
        check_fields(found)
        return checked(found)
    except (PostcopyError, UnfitError) as error:
        raise UsageError(f"{file}: {error}") from error


def no_number(word: str) -> float:
    """Refuse the words that Python takes for numbers and JSON does not."""
    raise ValueError(f"{word} is no number")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: what, each run's figure in words, and each as a multiple of the first run's."""

    name: str
    words: list[str]
    ratios: list[float | None]


def rows(runs: Sequence[Run]) -> Iterator[Row]:
    """Yield the table's lines."""
    reports = [run.report for run in runs]
    yield Row("memory", [memory(report) for report in reports], [])
    yield Row("mode", [report["mode"] for report in reports], [])
    yield figures("downtime", [report["downtime_seconds"] for report in reports], format_seconds)
    yield figures("until every page was there", [report["resident_seconds"] for report in reports], format_seconds)
    yield figures("throughput", [report["throughput_bytes_per_second"] for report in reports], format_rate)
    yield figures("on the wire", [report["bytes"]["wire"] for report in reports], format_size)
    for key, what in (("fault_latency_seconds", "fault"), ("stall_seconds", "stall")):
        yield figures(f"{what}s", [report[key]["count"] for report in reports], lambda count: f"{count:.0f}")
        for percentile, label in PERCENTILES:
            yield figures(f"{what} {label}", [report[key][percentile] for report in reports], format_seconds)
    parts = [run.fault_parts() for run in runs]
    for name in (*PARTS, "wake"):
        if any(name in one for one in parts):
            yield figures(f"fault's mean {name}", [one.get(name, 0.0) for one in parts], format_seconds)
    reconnects = [report.get("details", {}).get("reconnects", 0) for report in reports]
    if any(reconnects):
        yield figures("connected anew", reconnects, lambda count: f"{count} times" if count != 1 else "once")
    for side in ("source", "destination"):
        yield figures(f"CPU, {side}", [report["cpu_seconds"][side] for report in reports], format_seconds)
    yield Row("check", [verdict(report) for report in reports], [])
    yield Row("where", [environment(report) for report in reports], [])


def figures(name: str, values: list[float], form: Any) -> Row:
    """Build a line of numbers."""
    first = values[0]
    return Row(name, [form(value) for value in values], [value / first if first else None for value in values[1:]])


def memory(report: dict[str, Any]) -> str:
    """Say what was migrated."""
    return ", ".join(f"{format_size(one['size_bytes'])} {one['type']}" for one in report["memory"])


def verdict(report: dict[str, Any]) -> str:
    """Say what the check found."""
    found = report["integrity"]
    if not found["pages_checked"]:
        return "not checked"
    wrong = found["pages_mismatched"]
    return f"WRONG: {wrong} pages differ" if wrong else f"every byte of {found['pages_checked']} pages is right"


def environment(report: dict[str, Any]) -> str:
    """Say on what it ran."""
    found = report.get("environment", {})
    tls = "TLS" if found.get("tls") else "no TLS"
    return f"Linux {found.get('kernel')}, {found.get('cpus')} CPUs, pinning {found.get('pinning')}, {tls}"
