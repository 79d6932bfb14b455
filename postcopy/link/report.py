"""The report of one migration: the destination's part, which travels in AllPlaced, and the whole, made at the source.

Counters of both pumps and the source's timeline enter; the one object that `demo`, `migrate` and `status` print leaves.
All values are in SI base units.

`details.fault_parts_seconds` has the parts of a fault's mean time, of those `faults` whose page came as the answer to
their own request: `request` (the fault read, its request sent), `source` (as it says itself: a request read, its answer
sent), `wire` (all else until the answer is here: sockets and scheduling at both ends as well), `place`. What only a
destination tells has `answer` in place of `source` and `wire`.

`details.course` has columns over time (see course.py), `details.fault_latency` and `details.stall` whole distributions.

`details.downtime_parts_seconds` has the downtime's parts, which add up to it: `stop` (the guest's last step to STATE
sent), `load` (to RUN sent), `run` (to the guest's first step at the destination). `details.downtime_is_exact` says
whether that first step was read from the same clock; if not it counts from when RUNNING was heard of, so the downtime
and its `run` are longer by that way.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from postcopy import __version__
from postcopy.errors import PostcopyError
from postcopy.limits import LOST_EXTENTS_MAX
from postcopy.link.course import distribution
from postcopy.link.guest import MigratingGuest
from postcopy.link.residence import Extent
from postcopy.pages.regions import Layout
from postcopy.pump.destination import DestinationStats
from postcopy.pump.source import SourceStats
from postcopy.session.timeline import Timeline

SCHEMA_VERSION = 1
CHECK_PAGE_BYTES = 4096
PERCENTILES = ("count", "p50", "p90", "p99", "p999", "max", "mean")

# Without these nobody could show it.
NEEDED = ("mode", "memory", "resident_seconds", "fault_latency_seconds", "stall_seconds", "bytes", "integrity")


Report = dict[str, Any]


def arrived(
    mode: str,
    layout: Layout,
    stats: DestinationStats,
    guest: MigratingGuest,
    timing: dict[str, float],
    *,
    course: dict[str, list[float]],
    tls: bool,
    left: int = 0,
) -> Report:
    """Build what the destination knows: everything but the source's clock and CPU time.

    `left` pages never came because nobody needs them any more: an outside VMM's process has ended. Those that are
    `kept` had come before the agent was killed whose place this one has taken.
    """
    latency = stats.fault_latency.summary()
    report: Report = {
        "schema_version": SCHEMA_VERSION,
        "outcome": "completed",
        "mode": mode,
        "memory": [
            {"type": region.type, "page_size": region.page_size, "size_bytes": region.size} for region in layout.regions
        ],
        "downtime_seconds": timing["downtime_seconds"],
        "total_seconds": timing["resident_seconds"],
        "resident_seconds": timing["resident_seconds"],
        "fault_latency_seconds": {key: latency[key] for key in PERCENTILES},
        "stall_seconds": guest.stall.summary(),
        "pages": _pages(stats, left),
        "bytes": {"wire": stats.bytes_received_urgent + stats.bytes_received_push, "placed": stats.bytes_placed},
        "throughput_bytes_per_second": _rate(stats, timing["resident_seconds"]),
        "cpu_seconds": {"source": 0.0, "destination": stats.cpu_seconds},
        "integrity": integrity(0, 0),
        "environment": environment(tls=tls),
        "details": {
            "course": course,
            "fault_latency": distribution(stats.fault_latency),
            "stall": distribution(guest.stall),
            "fault_parts_seconds": fault_parts(stats),
        },
    }
    return checked(report)


def fault_parts(stats: DestinationStats) -> dict[str, float]:
    """Return the mean parts of a fault as the destination's clock has them; {} where no fault fetched its page."""
    count = stats.faults_fetched
    if not count:
        return {}
    sums = {"request": stats.request_seconds, "answer": stats.answer_seconds, "place": stats.place_seconds}
    return {"faults": count, **{name: whole / count for name, whole in sums.items()}}


def with_source(parts: Any, stats: SourceStats | None) -> Any:
    """Return the parts with the answer's time split in the source's own and all else."""
    if stats is None or not stats.requests_answered or not isinstance(parts, dict):
        return parts
    answer = parts.get("answer")
    if not isinstance(answer, float):
        return parts
    own = min(answer, stats.answer_seconds / stats.requests_answered)
    others = {name: part for name, part in parts.items() if name not in {"answer", "place"}}
    return {**others, "source": own, "wire": answer - own, "place": parts.get("place", 0.0)}


def _pages(stats: DestinationStats, left: int) -> dict[str, int]:
    return {
        "total": stats.pages_total,
        "demand": stats.pages_demand,
        "push": stats.pages_push,
        "zero": stats.pages_zero,
        "handed_over": stats.pages_handed_over,
        "duplicate": stats.pages_duplicate,
        **({"left": left} if left else {}),
        **({"kept": stats.pages_kept} if stats.pages_kept else {}),
    }


def gone(
    mode: str,
    layout: Layout,
    stats: DestinationStats,
    guest: MigratingGuest,
    timing: dict[str, float],
    *,
    course: dict[str, list[float]],
    tls: bool,
    lost: Sequence[Extent],
) -> Report:
    """Build what the destination knows of a guest that lost pages: `pages.lost` of them, which will never come.

    What nobody knows or what never was is None: when all was here and with that the throughput, the source's CPU time,
    the downtime where the hosts share no clock. `details.lost_extents` says which pages, the first of them: region,
    offset and length in bytes.
    """
    here = replace(stats, pages_total=stats.pages_resident)
    report = arrived(mode, layout, here, guest, timing, course=course, tls=tls)
    never = ("total_seconds", "resident_seconds", "throughput_bytes_per_second")
    report |= {"outcome": "lost", "downtime_seconds": report["downtime_seconds"] or None, **dict.fromkeys(never)}
    report["cpu_seconds"]["source"] = None
    report["pages"] |= {"total": stats.pages_total, "lost": stats.pages_total - stats.pages_resident}
    report["details"]["lost_extents"] = [list(one) for one in lost[:LOST_EXTENTS_MAX]]
    return report


def completed(report: Report, timeline: Timeline, stats: SourceStats | None, reconnects: int = 0) -> Report:
    """Add what the source knows to what the destination reported."""
    whole = dict(report)
    whole["downtime_seconds"] = timeline.downtime
    whole["total_seconds"] = timeline.total
    cpu = dict(report.get("cpu_seconds", {}))
    cpu["source"] = stats.cpu_seconds if stats is not None else 0.0
    whole["cpu_seconds"] = cpu
    details = report.get("details", {})
    whole["details"] = {
        **details,
        "fault_parts_seconds": with_source(details.get("fault_parts_seconds", {}), stats),
        "downtime_parts_seconds": timeline.parts(),
        "downtime_is_exact": timeline.exact,
        "reconnects": reconnects,
    }
    return checked(whole)


def with_check(report: Report, pages_checked: int, pages_mismatched: int) -> Report:
    """Add the verdict of a check of the guest's memory."""
    return {**report, "integrity": integrity(pages_checked, pages_mismatched)}


def integrity(pages_checked: int, pages_mismatched: int) -> dict[str, int]:
    """Build the verdict of a check; its pages are the guest's, whatever those of the memory are."""
    return {"page_size": CHECK_PAGE_BYTES, "pages_checked": pages_checked, "pages_mismatched": pages_mismatched}


def checked(report: Report) -> Report:
    """Return the report if it is whole and its pages add up; a report of another agent is not believed blindly."""
    try:
        for key in NEEDED:
            _ = report[key]
        pages = report["pages"]
        # an agent that takes no memory over says nothing of it, nor one whose pages all came, to itself, of the others
        optional = sum(pages.get(name, 0) for name in ("handed_over", "left", "kept"))
        parts = pages["demand"] + pages["push"] + pages["zero"] + optional
        if parts != pages["total"]:
            raise PostcopyError(f"the report does not add up: {parts} pages of {pages['total']}")
    except (KeyError, TypeError) as error:
        raise PostcopyError(f"the report is incomplete: {error}") from error
    return report


def environment(*, tls: bool) -> dict[str, Any]:
    """Say on what the figures were made, and whether all of it was encrypted."""
    return {
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "pinning": "none",
        "tls": tls,
        "version": __version__,
    }


def _rate(stats: DestinationStats, seconds: float) -> float:
    received = stats.bytes_received_urgent + stats.bytes_received_push
    return received / seconds if seconds > 0 else 0.0
