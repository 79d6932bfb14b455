"""Prometheus metrics of a daemon: read when they are asked for, never on the way of a page.

How a daemon stands and what it has counted enter through `Figures`, text leaves. They are read in the event loop's
thread, which is the one that makes and frees what they are read from.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import ProcessCollector

from agent.counts import NO_MODE, Counts
from agent.exposition import Exposition, Family, Values
from postcopy import __version__
from postcopy.errors import HostError
from postcopy.kernel import MEMORY_TYPES
from postcopy.kernel.hugetlb import Hugetlb
from postcopy.link.placement import MODES
from postcopy.pump.histogram import Histogram
from postcopy.session.states import ENDED, State

# What many files tell is told again for so long.
SLOW_SECONDS = 1.0
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

# All series of a family, at 0, in the order in which they are told.
_STATES = dict.fromkeys(((one.value,) for one in State), 0)
_ENDS = {
    told: dict.fromkeys(
        ((role, mode, end.value) for role in roles for mode in (*MODES, NO_MODE) for end in sorted(ENDED)), 0
    )
    for told, roles in ROLES.items()
}
_PAGES = {
    role: dict.fromkeys(((direction, path) for direction in directions for path in PATHS), 0)
    for role, directions in DIRECTIONS.items()
}
_MOVED = {role: dict.fromkeys((*channels, *CONTROL), 0) for role, channels in CHANNELS.items()}
_FAULTS = dict.fromkeys(((kind, result) for kind in KINDS for result in RESULTS), 0)


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
        self._slow: list[Family] = []
        self._slow_until = 0.0

    def text(self) -> str:
        """Read once, then tell all of it."""
        now = self._figures()
        families = [*session_families(now), *page_families(now)]
        if now.role == "destination":
            families += fault_families(now)
        if now.counts.stall is not None:
            text = "The guests' accesses here that took 1 microsecond or more."
            families.append(histogram("stall_seconds", text, now.counts.stall))
        return self._exposition.text_of([*families, *self._slowly()])

    def _slowly(self) -> list[Family]:
        now = time.monotonic()
        if now >= self._slow_until:
            self._slow, self._slow_until = [*host_families(), *process_families()], now + SLOW_SECONDS
        return self._slow


def session_families(now: Figures) -> Iterator[Family]:
    """Tell where migrations stand and what became of them."""
    yield gauge("build_info", "What this agent is; always 1.", {(__version__, now.role): 1}, ("version", "role"))
    state = {**_STATES, (now.state.value,): 1}
    yield gauge("migration_state", "1 for the state the migration is in.", state, ("state",))
    yield gauge("guest_owned", "1 while this agent owns a guest, which would be gone with it.", int(now.owns_guest))
    text = f"Migrations that ended; mode {NO_MODE}: before this side was told it."
    ended = {**_ENDS[now.role], **now.counts.migrations}
    yield counter("migrations", text, ended, ("role", "mode", "outcome"))
    text = "From the start of the latest migration to its last page; of one to here, from the guest's start here."
    yield gauge("migration_duration_seconds", text, now.duration_seconds)
    text = "How long the guest stood still in the latest migration; where the hosts share no clock, its source tells "
    text += "how long at most, and its destination 0."
    yield gauge("migration_downtime_seconds", text, now.downtime_seconds)
    yield counter("reconnects", "Times that a migration was resumed after a pause.", now.counts.reconnects)


def page_families(now: Figures) -> Iterator[Family]:
    """Tell what moved, and what is still to move."""
    text = "Pages by direction and by the way they went first; path duplicate: they went again, in vain; path "
    text += "handed_over: not sent, but given away with their file."
    yield counter("pages", text, _every(_PAGES[now.role], now.counts.pages), ("direction", "path"))
    text = "Bytes that this agent sent and received, by connection."
    moved = _every(_MOVED[now.role], now.counts.transferred)
    yield counter("transferred_bytes", text, moved, ("direction", "channel"))
    yield gauge("remaining_bytes", "Bytes of guest memory that are not at the destination yet.", now.remaining_bytes)


def fault_families(now: Figures) -> Iterator[Family]:
    """Tell what the guest's touch set off, which only a destination sees."""
    counts = now.counts
    text = "Page faults read from userfaultfd: the page was requested, or joined: on its way or here already."
    yield counter("faults", text, _every(_FAULTS, counts.faults), ("kind", "result"))
    text = "Pages handed to the kernel, by what it said."
    yield counter("placements", text, {(one,): counts.placements.get(one, 0) for one in OUTCOMES}, ("result",))
    yield gauge("request_queue_depth", "Faults that wait for their page.", now.queue_depth)
    yield counter("uffd_retries", "Placements that the kernel asked to repeat.", counts.retries)
    text = "Fault read by the agent to page placed by it."
    yield histogram("fault_latency_seconds", text, counts.fault_latency or Histogram())


def host_families() -> Iterator[Family]:
    """Tell how many huge pages the host has set aside; nothing of a size that it does not know."""
    total: dict[tuple[str, ...], int] = {}
    left: dict[tuple[str, ...], int] = {}
    for kind in MEMORY_TYPES.values():
        if type(kind) is Hugetlb:
            with contextlib.suppress(HostError):
                pool = kind.pool()
                total[(kind.name,)] = pool.total * kind.page_size
                left[(kind.name,)] = pool.unclaimed * kind.page_size
    yield gauge("hugetlb_pool_bytes", "Huge pages that this host set aside.", total, ("type",))
    yield gauge("hugetlb_unclaimed_bytes", "Those nobody has or was promised.", left, ("type",))


def process_families() -> Iterator[Family]:
    """Tell what any process tells, under the names that every Prometheus knows."""
    for family in ProcessCollector(registry=None).collect():
        values = {tuple(one.labels.values()): one.value for one in family.samples}
        yield Family(family.name, family.type, family.documentation, (), values)


def _every(every: Mapping[Any, int], counts: Mapping[Any, int]) -> dict[Any, int]:
    """Return counts of all series there are; what was counted beside them is not told."""
    return {key: counts.get(key, 0) for key in every}


def gauge(name: str, text: str, value: float | Values, labels: tuple[str, ...] = ()) -> Family:
    """Build a gauge: one number, or numbers by the values of their labels."""
    return _family("gauge", name, text, value, labels)


def counter(name: str, text: str, value: float | Values, labels: tuple[str, ...] = ()) -> Family:
    """Build a counter, as gauge() does."""
    return _family("counter", name, text, value, labels)


def _family(kind: str, name: str, text: str, value: float | Values, labels: tuple[str, ...]) -> Family:
    return Family(_PREFIX + name, kind, text, labels, value if isinstance(value, Mapping) else {(): value})


def histogram(name: str, text: str, recorded: Histogram) -> Family:
    """Build a histogram with QEMU's buckets."""
    buckets = {(le,): count for le, count in recorded.prometheus_buckets()}
    return Family(_PREFIX + name, "histogram", text, ("le",), buckets, recorded.sum_ns / 1e9)
