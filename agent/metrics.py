"""Prometheus metrics of a daemon: read when they are asked for, never on the way of a page.

How a daemon stands and what it has counted enter through `Figures`, text leaves. They are read in the event loop's
thread, which is the one that makes and frees what they are read from.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import ProcessCollector

from agent.counts import NO_MODE, Counts
from agent.exposition import Exposition, Family, Told
from postcopy import __version__
from postcopy.errors import HostError
from postcopy.kernel import MEMORY_TYPES
from postcopy.kernel.hugetlb import Hugetlb
from postcopy.link.placement import MODES
from postcopy.pump.histogram import PROMETHEUS_BOUNDS, Histogram
from postcopy.session.states import ENDED, State

# What many files tell is told again for so long, for reading it takes longer than all the rest: a Prometheus that asks
# every 5 s is told nothing old.
SLOW_SECONDS = 4.0
_PREFIX = "postcopy_"

# What is counted from the start: a counter that appears with its first value has never risen, to Prometheus.
PATHS = ("demand", "push", "zero", "handed_over", "duplicate")
KINDS = ("missing", "minor", "wp")
RESULTS = ("requested", "joined")
OUTCOMES = ("placed", "present", "retry", "gone", "busy")
# A destination's guest may go on, and then it sends, too.
CHANNELS = {
    "source": (("sent", "urgent"), ("sent", "push"), ("received", "urgent")),
    "destination": (("received", "urgent"), ("received", "push"), ("sent", "urgent"), ("sent", "push")),
}
CONTROL = (("sent", "control"), ("received", "control"))
DIRECTIONS = {"source": ("sent",), "destination": ("received", "sent")}
# A destination is the source of a guest that goes on.
ROLES = {"source": ("source",), "destination": ("destination", "source")}


def gauge(name: str, text: str, labels: tuple[str, ...] = (), keys: Iterable[tuple[str, ...]] = ((),)) -> Family:
    """Describe a gauge: one number, or a number for each of the keys."""
    return Family(_PREFIX + name, "gauge", text, labels, tuple(keys))


def counter(name: str, text: str, labels: tuple[str, ...] = (), keys: Iterable[tuple[str, ...]] = ((),)) -> Family:
    """Describe a counter, as gauge() does."""
    return Family(_PREFIX + name, "counter", text, labels, tuple(keys))


def histogram(name: str, text: str) -> Family:
    """Describe a histogram with QEMU's buckets."""
    return Family(_PREFIX + name, "histogram", text, ("le",), tuple((le,) for le in PROMETHEUS_BOUNDS))


_BUILD_INFO = {
    role: gauge("build_info", "What this agent is; always 1.", ("version", "role"), [(__version__, role)])
    for role in ROLES
}
_STATES = tuple(State)
_STATE = gauge("migration_state", "1 for the state the migration is in.", ("state",), [(one.value,) for one in _STATES])
_GUEST_OWNED = gauge("guest_owned", "1 while this agent owns a guest, which would be gone with it.")
_MIGRATIONS = {
    told: counter(
        "migrations",
        f"Migrations that ended; mode {NO_MODE}: before this side was told it.",
        ("role", "mode", "outcome"),
        [(role, mode, end.value) for role in roles for mode in (*MODES, NO_MODE) for end in sorted(ENDED)],
    )
    for told, roles in ROLES.items()
}
_DURATION = gauge(
    "migration_duration_seconds",
    "From the start of the latest migration to its last page; of one to here, from the guest's start here.",
)
_DOWNTIME = gauge(
    "migration_downtime_seconds",
    "How long the guest stood still in the latest migration; where the hosts share no clock, its source tells how long "
    "at most, and its destination 0.",
)
_RECONNECTS = counter("reconnects", "Times that a migration was resumed after a pause.")
_PAGES = {
    role: counter(
        "pages",
        "Pages by direction and by the way they went first; path duplicate: they went again, in vain; path "
        "handed_over: not sent, but given away with their file.",
        ("direction", "path"),
        [(direction, path) for direction in directions for path in PATHS],
    )
    for role, directions in DIRECTIONS.items()
}
_TRANSFERRED = {
    role: counter(
        "transferred_bytes",
        "Bytes that this agent sent and received, by connection.",
        ("direction", "channel"),
        (*channels, *CONTROL),
    )
    for role, channels in CHANNELS.items()
}
_REMAINING = gauge("remaining_bytes", "Bytes of guest memory that are not at the destination yet.")
_FAULTS = counter(
    "faults",
    "Page faults read from userfaultfd: the page was requested, or joined: on its way or here already.",
    ("kind", "result"),
    [(kind, result) for kind in KINDS for result in RESULTS],
)
_PLACEMENTS = counter(
    "placements", "Pages handed to the kernel, by what it said.", ("result",), [(one,) for one in OUTCOMES]
)
_QUEUE = gauge("request_queue_depth", "Faults that wait for their page.")
_RETRIES = counter("uffd_retries", "Placements that the kernel asked to repeat.")
_LATENCY = histogram("fault_latency_seconds", "Fault read by the agent to page placed by it.")
_STALL = histogram("stall_seconds", "The guests' accesses here that took 1 microsecond or more.")


@dataclass
class Figures:
    """What a daemon has to tell, at one moment: how its latest migration stands, and `counts`.

    The counts that are scraped are of all migrations since the daemon began, those of a look of the latest one.
    `role` is "source" or "destination". `owns_guest`: a guest runs here, or would be gone with this agent.
    """

    role: str
    state: State = State.NONE
    owns_guest: bool = False
    duration_seconds: float = 0.0
    downtime_seconds: float = 0.0
    remaining_bytes: int = 0
    queue_depth: int = 0
    counts: Counts = field(default_factory=Counts)


class Metrics:
    """What is told of one daemon: of `figures`, of its process and of its host."""

    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures
        self._exposition = Exposition()
        self._slow: list[Told] = []
        self._slow_until = 0.0

    def text(self) -> str:
        """Read once, then tell all of it."""
        now = self._figures()
        told = [*_session(now), *_pages(now)]
        if now.role == "destination":
            told += _faults(now)
        if now.counts.stall is not None:
            told.append((_STALL, _recorded(now.counts.stall)))
        return self._exposition.text_of([*told, *self._slowly()])

    def _slowly(self) -> list[Told]:
        now = time.monotonic()
        if now >= self._slow_until:
            self._slow, self._slow_until = [*host_families(), *process_families()], now + SLOW_SECONDS
        return self._slow


def _session(now: Figures) -> list[Told]:
    """Tell where migrations stand and what became of them."""
    return [
        (_BUILD_INFO[now.role], (1,)),
        (_STATE, [int(one is now.state) for one in _STATES]),
        (_GUEST_OWNED, (int(now.owns_guest),)),
        _counted(_MIGRATIONS[now.role], now.counts.migrations),
        (_DURATION, (now.duration_seconds,)),
        (_DOWNTIME, (now.downtime_seconds,)),
        (_RECONNECTS, (now.counts.reconnects,)),
    ]


def _pages(now: Figures) -> list[Told]:
    """Tell what moved, and what is still to move."""
    return [
        _counted(_PAGES[now.role], now.counts.pages),
        _counted(_TRANSFERRED[now.role], now.counts.transferred),
        (_REMAINING, (now.remaining_bytes,)),
    ]


def _faults(now: Figures) -> list[Told]:
    """Tell what the guest's touch set off, which only a destination sees."""
    counts = now.counts
    return [
        _counted(_FAULTS, counts.faults),
        (_PLACEMENTS, [counts.placements.get(one, 0) for one in OUTCOMES]),
        (_QUEUE, (now.queue_depth,)),
        (_RETRIES, (counts.retries,)),
        (_LATENCY, _recorded(counts.fault_latency or Histogram())),
    ]


def _counted(family: Family, counts: Mapping[Any, int]) -> Told:
    """Tell the counts of all series there are; what was counted beside them is not told."""
    return family, [counts.get(key, 0) for key in family.keys]


def _recorded(recorded: Histogram) -> list[float]:
    cumulative = recorded.cumulative()
    return [*cumulative, cumulative[-1], recorded.sum_ns / 1e9]


def host_families() -> Iterator[Told]:
    """Tell how many huge pages the host has set aside; nothing of a size that it does not know."""
    total: dict[tuple[str, ...], int] = {}
    left: dict[tuple[str, ...], int] = {}
    for kind in MEMORY_TYPES.values():
        if type(kind) is Hugetlb:
            with contextlib.suppress(HostError):
                pool = kind.pool()
                total[(kind.name,)] = pool.total * kind.page_size
                left[(kind.name,)] = pool.unclaimed * kind.page_size
    yield gauge("hugetlb_pool_bytes", "Huge pages that this host set aside.", ("type",), total), [*total.values()]
    yield gauge("hugetlb_unclaimed_bytes", "Those nobody has or was promised.", ("type",), left), [*left.values()]


def process_families() -> Iterator[Told]:
    """Tell what any process tells, under the names that every Prometheus knows."""
    for family in ProcessCollector(registry=None).collect():
        yield Family(family.name, family.type, family.documentation), [one.value for one in family.samples]
