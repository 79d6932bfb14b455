"""Figures of many migrations at a time, as one daemon shows them: those that are over and those that run, added up.

Counters and histograms of each migration enter; what a scrape shows leaves. Sums never go back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from agent import metrics
from agent.metrics import pages_sent
from postcopy.pump.destination import DestinationStats
from postcopy.pump.histogram import Histogram
from postcopy.pump.source import SourceStats
from postcopy.session.states import State
from postcopy.wire.frame import HEADER_BYTES

# Of several migrations the one that is furthest from its end says what the daemon is doing.
_BUSIEST = (
    State.POSTCOPY_PAUSED,
    State.POSTCOPY_RECOVER,
    State.POSTCOPY_ACTIVE,
    State.DEVICE,
    State.SETUP,
)


def busiest(states: Iterable[State]) -> State:
    """Return the state that stands for all of them."""
    found = set(states)
    return next((state for state in _BUSIEST if state in found), State.NONE)


def of_source(stats: SourceStats | None, pages: int, control: tuple[int, int]) -> metrics.Figures:
    """Return one migration's figures at its source."""
    figures = metrics.Figures("source", transferred=metrics.control_bytes(control))
    if stats is not None:
        figures.pages = pages_sent(stats, pages)
        figures.transferred |= {
            ("sent", "urgent"): stats.bytes_sent_urgent,
            ("sent", "push"): stats.bytes_sent_push,
            ("received", "urgent"): stats.requests * HEADER_BYTES,
        }
    return figures


def of_destination(stats: DestinationStats | None, control: tuple[int, int], reconnects: int = 0) -> metrics.Figures:
    """Return one migration's figures at its destination."""
    figures = metrics.Figures("destination", transferred=metrics.control_bytes(control), reconnects=reconnects)
    if stats is not None:
        kinds = {"missing": stats.faults_missing, "minor": stats.faults_minor, "wp": stats.faults_wp}
        figures.faults = metrics.faults_by_result(kinds, stats.requests, {})
        figures.placements = stats.outcomes
        figures.retries = stats.outcomes["retry"]
        figures.fault_latency = stats.fault_latency
        figures.queue_depth = stats.pending
        figures.pages = {
            "demand": stats.pages_demand,
            "push": stats.pages_push,
            "zero": stats.pages_zero,
            "duplicate": stats.pages_duplicate,
        }
        figures.transferred |= {
            ("received", "urgent"): stats.bytes_received_urgent,
            ("received", "push"): stats.bytes_received_push,
            ("sent", "urgent"): stats.bytes_sent_urgent,
        }
    return figures


def add(total: metrics.Figures, one: metrics.Figures) -> None:
    """Add one migration's counters to a sum; what is no counter stays as it is."""
    for name in ("faults", "placements", "pages", "transferred"):
        counts: Counter[Any] = Counter(getattr(total, name))
        counts.update(getattr(one, name))
        setattr(total, name, dict(counts))
    total.retries += one.retries
    total.reconnects += one.reconnects
    total.queue_depth += one.queue_depth
    if one.fault_latency is not None:
        total.fault_latency = (total.fault_latency or Histogram()).merge(one.fault_latency)


def no_less(now: dict[Any, int], before: dict[Any, int]) -> dict[Any, int]:
    """Return counts none of which is below what was told last: a pump counts on while it is read."""
    return {key: max(now.get(key, 0), before.get(key, 0)) for key in {**before, **now}}
