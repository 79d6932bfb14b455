"""What a daemon counts: of one migration, and of all that it ever had, added up.

Migrations enter as they begin; counters and histograms leave, none of which goes back for as long as the process lives:
that is what a counter is to Prometheus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from postcopy.link.destination_interpreter import DestinationInterpreter
from postcopy.link.fetched import FetchedInterpreter
from postcopy.link.placement import MODES
from postcopy.link.source_interpreter import SourceInterpreter
from postcopy.pump.destination import DestinationStats
from postcopy.pump.histogram import Histogram
from postcopy.pump.source import SourceStats
from postcopy.session.states import SWITCHED, State
from postcopy.wire.frame import HEADER_BYTES

# The source learns the mode with the last page: a migration that ended before has none.
NO_MODE = "none"

# Memory that is handed over is the destination's before the guest is.
CAME = frozenset({*SWITCHED, State.COMPLETED, State.LOST})

_BUSIEST = (
    State.POSTCOPY_PAUSED,
    State.POSTCOPY_RECOVER,
    State.POSTCOPY_ACTIVE,
    State.DEVICE,
    State.SETUP,
)

Migration = DestinationInterpreter | SourceInterpreter | FetchedInterpreter


@dataclass
class Counts:
    """Counters and histograms.

    Keys of the mappings are label values: ends of migrations by (role, mode, outcome), faults by (kind, result),
    placements by outcome, pages by (direction, path), bytes by (direction, channel).
    """

    migrations: dict[tuple[str, str, str], int] = field(default_factory=dict)
    faults: dict[tuple[str, str], int] = field(default_factory=dict)
    placements: dict[str, int] = field(default_factory=dict)
    fault_latency: Histogram | None = None
    stall: Histogram | None = None
    pages: dict[tuple[str, str], int] = field(default_factory=dict)
    transferred: dict[tuple[str, str], int] = field(default_factory=dict)
    retries: int = 0
    reconnects: int = 0

    def add(self, other: Counts) -> None:
        """Add what another one has counted."""
        for name in _COUNTED:
            setattr(self, name, added(getattr(self, name), getattr(other, name)))


_COUNTED = tuple(one.name for one in fields(Counts))


def added(one: Any, other: Any) -> Any:
    """Return the sum of two numbers, two histograms or two mappings to numbers; None is nothing."""
    if not one or not other:
        return one or other
    if isinstance(one, Histogram):
        return one.merge(other)
    if isinstance(one, dict):
        return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
    return one + other


class Totals:
    """All that one daemon has counted: in the migrations that are over, and in those that it still reads.

    A migration is read for as long as it may count on: until the next one begins where one is had at a time, and where
    there are many until its daemon says that it is over.
    """

    def __init__(self) -> None:
        self._past = Counts()
        self._latest: dict[str, Migration] = {}  # by role
        self._told: dict[tuple[str, str], int] = {}

    def begin(self, one: Migration) -> None:
        """Count a migration from now on, and the one of its role before it no further."""
        before = self._latest.get(one.role)
        if before is not None:
            self.end(before)
        self._latest[one.role] = one

    def end(self, one: Migration) -> None:
        """Take note of all that a migration has counted: it counts no more."""
        self._past.add(counts_of(one))

    def note(self, role: str, mode: str, outcome: State) -> None:
        """Take note of how a migration ended."""
        ended = Counter({(role, mode, outcome.value): 1})
        self._past.migrations = dict(ended + Counter(self._past.migrations))

    def latest(self, role: str) -> Counts:
        """Return what the latest migration of a role has counted."""
        return counts_of(self._latest[role]) if role in self._latest else Counts()

    @property
    def ended(self) -> int:
        """How many migrations have ended."""
        return sum(self._past.migrations.values())

    def counts(self, current: Iterable[Migration] = ()) -> Counts:
        """Return what was counted up to now; `current` are migrations that go on and were never told of by begin()."""
        parts = [counts_of(one) for one in (*self._latest.values(), *current)]
        whole = parts.pop() if parts else Counts()
        for part in (self._past, *parts):
            whole.add(part)
        whole.faults = self._told = not_taken_back(whole.faults, self._told)
        return whole


def counts_of(one: Migration) -> Counts:
    """Return what one migration has counted on this side."""
    sent, received = one.control_bytes
    counts = Counts(reconnects=one.machine.reconnects)
    counts.transferred = {("sent", "control"): sent, ("received", "control"): received}
    if isinstance(one, DestinationInterpreter):
        counts.stall = one.stall
        add_arrived(counts, one.snapshot())
        if one.machine.state not in CAME:
            counts.pages.pop(("received", "handed_over"), None)
    else:
        add_sent(counts, one.snapshot(), one.machine.pages)
    if isinstance(one, SourceInterpreter) and one.machine.state is State.COMPLETED and one.machine.offer.handed_over:
        counts.pages = {("sent", "handed_over"): one.machine.pages}
    return counts


def add_arrived(counts: Counts, stats: DestinationStats | None) -> None:
    """Add the counters of a destination's pump, if there was one."""
    if stats is None:
        return
    kinds = {"missing": stats.faults_missing, "minor": stats.faults_minor, "wp": stats.faults_wp}
    counts.faults = faults_by_result(kinds, stats.requests)
    counts.placements = stats.outcomes
    counts.retries = stats.outcomes["retry"]
    counts.fault_latency = stats.fault_latency
    counts.pages = {
        ("received", "demand"): stats.pages_demand,
        ("received", "push"): stats.pages_push,
        ("received", "zero"): stats.pages_zero,
        ("received", "handed_over"): stats.pages_handed_over,
        ("received", "duplicate"): stats.pages_duplicate,
    }
    counts.transferred |= {
        ("received", "urgent"): stats.bytes_received_urgent,
        ("received", "push"): stats.bytes_received_push,
        ("sent", "urgent"): stats.bytes_sent_urgent,
    }


def add_sent(counts: Counts, stats: SourceStats | None, total: int) -> None:
    """Add the counters of a source's pump, if there was one; its guest has `total` pages."""
    if stats is None:
        return
    counts.pages = {("sent", path): count for path, count in pages_sent(stats, total).items()}
    counts.transferred |= {
        ("sent", "urgent"): stats.bytes_sent_urgent,
        ("sent", "push"): stats.bytes_sent_push,
        ("received", "urgent"): stats.requests * HEADER_BYTES,
    }


def pages_sent(stats: SourceStats, total: int) -> dict[str, int]:
    """Return the pages sent by path. What came twice is known of a request; of a hole that was pushed, too, at the end.

    Nothing is sent in vain but duplicates: once every page has left, all beyond `total` are such.
    """
    sent = {"demand": stats.pages_demand, "push": stats.pages_push, "zero": stats.pages_zero}
    return {**sent, "duplicate": max(stats.pages_again, sum(sent.values()) - total)}


def faults_by_result(kinds: dict[str, int], requests: int) -> dict[tuple[str, str], int]:
    """Return faults by (kind, result): a page was `requested`, or is `joined` on its way here, or was here already.

    The pump counts faults by kind and requests apart; what is requested is a missing page wherever there are as many.
    """
    told, left = {}, requests
    for kind, count in kinds.items():
        requested = min(count, left)
        left -= requested
        told[kind, "requested"], told[kind, "joined"] = requested, count - requested
    return told


def busiest(states: Iterable[State]) -> State:
    """Return the state that stands for several migrations: of the one that is furthest from its end."""
    found = set(states)
    return next((state for state in _BUSIEST if state in found), State.NONE)


def not_taken_back(now: dict[tuple[str, str], int], before: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """Return faults by (kind, result): of each kind as many as there are now, of neither result fewer than were told.

    A request is counted a moment after its fault, which is joined to whoever reads in between, and stays so.
    """
    told = {}
    for kind in dict.fromkeys(kind for kind, _ in (*before, *now)):
        requested, joined = ((kind, result) for result in ("requested", "joined"))
        count = now.get(requested, 0) + now.get(joined, 0)
        most = count - before.get(joined, 0)
        told[requested] = min(max(now.get(requested, 0), before.get(requested, 0)), most)
        told[joined] = count - told[requested]
    return told


def mode_of(report: Any) -> str:
    """Return the mode that a report names, NO_MODE where there is none or it names nothing that is known here."""
    mode = report.get("mode") if isinstance(report, dict) else None
    return mode if isinstance(mode, str) and mode in MODES else NO_MODE
