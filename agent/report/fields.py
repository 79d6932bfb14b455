"""What the page needs of a report, field by field: one that anybody may have edited enters; what is wrong leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from postcopy.limits import REPORT_NUMBER_MAX

TIMES = ("fault_latency_seconds", "stall_seconds")
NUMBERS = (
    "resident_seconds",
    "throughput_bytes_per_second",
    "bytes.wire",
    *(f"{times}.{figure}" for times in TIMES for figure in ("count", "p50", "p90", "p99", "p999", "max", "mean")),
    "cpu_seconds.source",
    "cpu_seconds.destination",
    "pages.total",
    "pages.demand",
    "pages.push",
    "pages.zero",
    "integrity.pages_checked",
    "integrity.pages_mismatched",
)
COURSE = ("resident", "received_bytes", "p50", "p99")


class UnfitError(Exception):
    """A field is not what it has to be; the text names it."""


def check_fields(report: dict[str, Any]) -> None:
    """Raise UnfitError for the first field that is missing or that nothing can be made of."""
    text_of("mode", at(report, "mode"))
    for number, region in enumerate(list_of("memory", at(report, "memory"))):
        text_of(f"memory[{number}].type", at(region, "type", f"memory[{number}]."))
        count_of(f"memory[{number}].size_bytes", at(region, "size_bytes", f"memory[{number}]."))
    number_of("downtime_seconds", at(report, "downtime_seconds"))
    for path in NUMBERS:
        count_of(path, at(report, path))
    for path, count in map_of("pages", report["pages"]).items():
        count_of(f"pages.{path}", count)
    map_of("environment", report.get("environment", {}))
    check_details(map_of("details", report.get("details", {})))


def check_details(details: dict[str, Any]) -> None:
    """Raise UnfitError as above. What the details lack is not drawn; what they have is whole."""
    for name, part in map_of("details.downtime_parts_seconds", details.get("downtime_parts_seconds") or {}).items():
        number_of(f"details.downtime_parts_seconds.{name}", part)
    for name, part in map_of("details.fault_parts_seconds", details.get("fault_parts_seconds") or {}).items():
        count_of(f"details.fault_parts_seconds.{name}", part)
    count_of("details.reconnects", details.get("reconnects", 0))
    course = map_of("details.course", details.get("course") or {})
    if course.get("seconds"):
        check_columns("details.course", course, "seconds", COURSE)
    for what in ("fault_latency", "stall"):
        found = map_of(f"details.{what}", details.get(what) or {})
        if found:
            check_columns(f"details.{what}", found, "upper_seconds", ("counts",))


def check_columns(path: str, columns: dict[str, Any], first: str, others: Iterable[str]) -> None:
    """Raise UnfitError unless all columns are numbers, as many as the first one has."""
    length = len(list_of(f"{path}.{first}", at(columns, first, f"{path}.")))
    for name in (first, *others):
        column = list_of(f"{path}.{name}", at(columns, name, f"{path}."))
        if len(column) != length:
            raise UnfitError(f"{path}.{name} has {len(column)} values, and {path}.{first} has {length}")
        for number, value in enumerate(column):
            count_of(f"{path}.{name}[{number}]", value)


def at(report: Any, path: str, before: str = "") -> Any:
    """Return the field at "key.key"; `before` is where `report` itself is, for whoever reads of it."""
    found = report
    for known, key in steps(path):
        if not isinstance(found, dict):
            raise UnfitError(f"{(before + known).rstrip('.')} is {shown(found)}, not an object with {key!r}")
        if key not in found:
            raise UnfitError(f"it is incomplete: there is no {before}{known}{key}")
        found = found[key]
    return found


def steps(path: str) -> Iterator[tuple[str, str]]:
    """Yield each key of a path, and what stands before it."""
    known = ""
    for key in path.split("."):
        yield known, key
        known += f"{key}."


def number_of(path: str, value: Any) -> float:
    """Return a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= REPORT_NUMBER_MAX:
        raise UnfitError(f"{path} is {shown(value)}, not a number")
    return value


def count_of(path: str, value: Any) -> float:
    """Return a number that is not below 0."""
    if number_of(path, value) < 0:
        raise UnfitError(f"{path} is {shown(value)}: there is nothing below 0 of it")
    return float(value)


def text_of(path: str, value: Any) -> str:
    """Return a text."""
    if not isinstance(value, str):
        raise UnfitError(f"{path} is {shown(value)}, not a text")
    return value


def list_of(path: str, value: Any) -> list[Any]:
    """Return a list."""
    if not isinstance(value, list):
        raise UnfitError(f"{path} is {shown(value)}, not a list")
    return value


def map_of(path: str, value: Any) -> dict[str, Any]:
    """Return an object."""
    if not isinstance(value, dict):
        raise UnfitError(f"{path} is {shown(value)}, not an object")
    return value


def shown(value: Any) -> str:
    """Return a value for people, cut where it is long."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
