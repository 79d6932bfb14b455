"""Reports for people: a report of a migration enters, lines of text leave.

What nobody knows of a migration that was lost is null in its report, and unknown here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from postcopy.errors import PostcopyError
from postcopy.pages.units import format_rate, format_seconds, format_size

PERCENTILES = (("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("p999", "p99.9"), ("max", "max"))


def rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the report says, as pairs of name and value."""
    memory = ", ".join(f"{format_size(one['size_bytes'])} {one['type']}" for one in report["memory"])
    yield "memory", f"{memory}, mode {report['mode']}"
    yield "downtime", _downtime(report)
    yield "total time", f"{_known(report['total_seconds'])}{_residence(report)}"
    yield "fault latency", _times(report["fault_latency_seconds"], "faults")
    yield "guest's stall", _times(report["stall_seconds"], "accesses of 1 µs or more")
    pages = report["pages"]
    yield "pages", f"{pages['total']}: {_paths(pages)}"
    sizes = report["bytes"]
    rate = report["throughput_bytes_per_second"]
    rate = "unknown rate" if rate is None else format_rate(rate)
    yield "bytes", f"{format_size(sizes['wire'])} on the wire, {format_size(sizes['placed'])} placed, {rate}"
    cpu = report["cpu_seconds"]
    yield "CPU", f"source {_known(cpu['source'])}, destination {_known(cpu['destination'])}"
    before = report.get("details", {}).get("resident_pages_before_push")
    if before is not None:
        yield "before the push", f"{before} of {pages['total']} pages came by the guest's own touch"
    if report["integrity"]["pages_checked"]:
        yield "check", verdict(report["integrity"])


def _paths(pages: dict[str, Any]) -> str:
    if pages.get("handed_over"):
        return "all handed over with their files, none was sent"
    by_path = ", ".join(f"{pages[path]} {path}" for path in ("demand", "push", "zero"))
    left = f", {pages['left']} never touched" if pages.get("left") else ""
    lost = f", {pages['lost']} lost" if pages.get("lost") else ""
    return f"{by_path}{left}{lost}; {pages['duplicate']} came twice and were dropped"


def failure(error: PostcopyError) -> dict[str, Any]:
    """Return the object that is printed in place of a report; `outcome` is a migration's state where there was one."""
    outcome = {2: "refused", 5: "postcopy-paused", 6: "lost", 7: "cancelled"}.get(error.exit_status, "failed")
    return {
        "schema_version": 1,
        "outcome": "interrupted" if error.exit_status > 128 else outcome,
        "error": str(error),
        "owner": error.owner,
        "exit_status": error.exit_status,
    }


def verdict(integrity: dict[str, Any]) -> str:
    """Say what a check found; it counts pages of 4 KiB whatever the memory's own are."""
    checked, wrong = integrity["pages_checked"], integrity["pages_mismatched"]
    if wrong:
        return f"WRONG: {wrong} of {checked} pages (4 KiB each) differ"
    lost = f"; {integrity['pages_lost']} pages are lost" if integrity.get("pages_lost") else ""
    return f"every byte of {checked} pages (4 KiB each) is right{lost}"


def _known(seconds: float | None) -> str:
    return "unknown" if seconds is None else format_seconds(seconds)


def _downtime(report: dict[str, Any]) -> str:
    details = report.get("details", {})
    parts = details.get("downtime_parts_seconds") or {}
    words = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in parts.items())
    exact = "" if details.get("downtime_is_exact", True) else ", at most: the hosts share no clock"
    return _known(report["downtime_seconds"]) + (f" ({words}{exact})" if words else "")


def _residence(report: dict[str, Any]) -> str:
    if report["pages"].get("handed_over") or report["resident_seconds"] is None:
        return ""
    return f", of it {format_seconds(report['resident_seconds'])} until every page was at the destination"


def _times(times: dict[str, Any], what: str) -> str:
    if not times["count"]:
        return f"no {what}"
    words = ", ".join(f"{label} {format_seconds(times[key])}" for key, label in PERCENTILES)
    return f"{words} ({times['count']} {what})"


def _placed(one: dict[str, Any]) -> str:
    return f"{one['state']}, {one['pages']['placed']} of {one['pages']['total']} pages"


def _pause(paused: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if paused is not None:
        hand = " by hand" if paused["held"] else ""
        tried = f"; {paused['attempts']} attempts failed" if paused["attempts"] else ""
        yield "paused", f"for {format_seconds(paused['seconds'])}{hand}: {paused['text']}{tried}"


def _guest(guest: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if guest is None:
        return
    workload = f", {guest['workload']}" if "workload" in guest else ""
    yield "guest", f"{guest['kind']}{workload}, {guest['vcpus']} vCPUs, steps {', '.join(map(str, guest['steps']))}"
    if guest.get("lost_steps"):
        yield "lost pages", f"touched {guest['lost_steps']} times: a machine check each"
    if guest.get("trouble"):
        yield "guest's trouble", guest["trouble"]


def status_rows(status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what an agent answered to `status`, as pairs of name and value."""
    yield "agent", f"{status['role']}, pid {status['pid']}, version {status['version']}"
    if "address" in status:
        yield "listens on", status["address"] + (f", mode {status['mode']}" if "mode" in status else "")
    yield "state", status["state"]
    yield "guest's owner", status["owner"] or "no guest is here"
    yield from _pause(status.get("paused"))
    yield from _guest(status["guest"])
    for region in status["memory"]:
        yield "memory", f"{format_size(region['size_bytes'])} {region['type']}"
    if status["pages"]["placed"]:
        yield "pages", f"{status['pages']['placed']} of {status['pages']['total']} are at the destination"
    for one in status.get("processes", ()):
        yield f"process {one['pid']}", f"{_placed(one)}, {one['faults']} faults, {one['removed']} given back"
        yield from _pause(one.get("paused"))
    for one in status.get("destinations", ()):
        yield one["name"], _placed(one)
    latency = status.get("fault_latency_seconds")
    if latency is not None and latency["count"]:
        yield "fault latency", _times(latency, "faults")
    if status["ended"] is not None:
        yield "latest migration", status["ended"]["text"]
