"""Prometheus metrics of a daemon: read when they are asked for, never on the way of a page.

Figures of the pump, the guest and the session enter through `Figures`; metric families leave. A scrape is answered in
the HTTP server's thread, which asks the event loop's thread for the figures: nothing is read while it is being freed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from postcopy import __version__
from postcopy.errors import HostError, UsageError
from postcopy.kernel import MEMORY_TYPES
from postcopy.kernel.hugetlb import Hugetlb
from postcopy.limits import SCRAPE_SECONDS
from postcopy.link.address import TcpAddress
from postcopy.link.placement import MODES
from postcopy.pump.histogram import Histogram
from postcopy.pump.source import SourceStats
from postcopy.session.states import ENDED, State

log = logging.getLogger("postcopy.metrics")

# What many files tell is told again for so long.
SLOW_SECONDS = 1.0
# A scrape is a millisecond of Python and nobody waits for it, so on a small host it gives way to faults. But by no more
# than this: starved by a busy host it would keep the GIL, and the event loop would wait for it.
SCRAPE_NICE = 5
# The source learns the mode with the last page: a migration that ended before has none.
NO_MODE = "none"
_PREFIX = "postcopy_"

Labels = tuple[str, ...]
Samples = Mapping[Any, float]
"""By the values of their labels, Labels of one length."""

# What is counted from the start: a counter that appears with its first value has never risen, to Prometheus.
PATHS = ("demand", "push", "zero", "handed_over", "duplicate")
KINDS = ("missing", "minor", "wp")
RESULTS = ("requested", "joined")
OUTCOMES = ("placed", "present", "retry", "gone", "busy")
CHANNELS = {
    "source": (("sent", "urgent"), ("sent", "push"), ("received", "urgent")),
    "destination": (("received", "urgent"), ("received", "push"), ("sent", "urgent")),
}
PAGES_TEXT = {
    "source": "Pages sent, by what sent them; path duplicate: sent before; path handed_over: "
    "not sent, but given away with their file.",
    "destination": "Pages that arrived, by the way they came first; path duplicate: dropped, for they were here.",
}


@dataclass
class Figures:
    """What a daemon has to tell, at one moment. Counts are of the latest migration but for `migrations`.

    Keys of the mappings are label values: faults by (kind, result), placements by outcome, pages by path, bytes by
    (direction, channel), migrations by (role, mode, outcome). `role` is "source" or "destination". `owns_guest`: a
    guest runs here, or would be gone with this agent.
    """

    role: str
    state: State = State.NONE
    owns_guest: bool = False
    migrations: dict[tuple[str, str, str], int] = field(default_factory=dict)
    duration_seconds: float = 0.0
    downtime_seconds: float = 0.0
    faults: dict[tuple[str, str], int] = field(default_factory=dict)
    placements: dict[str, int] = field(default_factory=dict)
    fault_latency: Histogram | None = None
    stall: Histogram | None = None
    pages: dict[str, int] = field(default_factory=dict)
    transferred: dict[tuple[str, str], int] = field(default_factory=dict)
    remaining_bytes: int = 0
    queue_depth: int = 0
    retries: int = 0
    reconnects: int = 0


def mode_of(report: Any) -> str:
    """Return the mode that a report names, NO_MODE where there is none or it names nothing that is known here."""
    mode = report.get("mode") if isinstance(report, dict) else None
    return mode if isinstance(mode, str) and mode in MODES else NO_MODE


def control_bytes(sent_received: tuple[int, int]) -> dict[tuple[str, str], int]:
    """Return what a control connection carried, as `transferred` has it."""
    sent, received = sent_received
    return {("sent", "control"): sent, ("received", "control"): received}


def pages_sent(stats: SourceStats, total: int) -> dict[str, int]:
    """Return the pages sent by path. What came twice is known of a request; of a hole that was pushed, too, at the end.

    Nothing is sent in vain but duplicates: once every page has left, all beyond `total` are such.
    """
    sent = {"demand": stats.pages_demand, "push": stats.pages_push, "zero": stats.pages_zero}
    return {**sent, "duplicate": max(stats.pages_again, sum(sent.values()) - total)}


def faults_by_result(
    kinds: dict[str, int], requests: int, before: dict[tuple[str, str], int]
) -> dict[tuple[str, str], int]:
    """Return faults by (kind, result): a page was `requested`, or is `joined` on its way here, or was here already.

    The pump counts faults by kind and requests apart; what is requested is a missing page wherever there are as many.
    It counts on while it is read, and counters may never go back: none is less than `before`, which was told last.
    """
    told, left = {}, requests
    for kind, count in kinds.items():
        requested = min(count, left)
        left -= requested
        told[kind, "requested"], told[kind, "joined"] = requested, count - requested
    if sum(told.values()) < sum(before.values()):
        return told  # of another migration
    return {key: max(count, before.get(key, 0)) for key, count in told.items()}


class MigrationCollector(Collector):
    """Turns Figures into families. `figures` is called in the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, figures: Callable[[], Figures]) -> None:
        self._loop = loop
        self._figures = figures
        self._slow: list[Metric] = []
        self._slow_until = 0.0

    def describe(self) -> list[Metric]:
        """Name nothing ahead: the registry must not read a pump that is not there yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read once, then tell all of it."""
        now = asyncio.run_coroutine_threadsafe(self._read(), self._loop).result(SCRAPE_SECONDS)
        yield from session_families(now)
        yield from page_families(now)
        if now.role == "destination":
            yield from fault_families(now)
        yield from histogram("stall_seconds", "The guest's accesses here that took 1 microsecond or more.", now.stall)
        yield from self._slowly()

    async def _read(self) -> Figures:
        return self._figures()

    def _slowly(self) -> list[Metric]:
        now = time.monotonic()
        if now >= self._slow_until:
            self._slow, self._slow_until = list(host_families()), now + SLOW_SECONDS
        return self._slow


def session_families(now: Figures) -> Iterator[Metric]:
    """Tell where migrations stand and what became of them."""
    yield gauge("build_info", "What this agent is; always 1.", {(__version__, now.role): 1}, ("version", "role"))
    states = {(one.value,): int(one is now.state) for one in State}
    yield gauge("migration_state", "1 for the state the migration is in.", states, ("state",))
    yield gauge("guest_owned", "1 while this agent owns a guest, which would be gone with it.", int(now.owns_guest))
    text = f"Migrations that ended; mode {NO_MODE}: before this side was told it."
    every = [(now.role, mode, end.value) for mode in (*MODES, NO_MODE) for end in sorted(ENDED)]
    ended = {**dict.fromkeys(every, 0), **now.migrations}
    yield counter("migrations", text, ended, ("role", "mode", "outcome"))
    begin = "start of the latest migration" if now.role == "source" else "guest's start here in the latest migration"
    yield gauge("migration_duration_seconds", f"From the {begin} to its last page.", now.duration_seconds)
    limit = "at most, where the hosts share no clock" if now.role == "source" else "0 where the hosts share no clock"
    yield gauge(
        "migration_downtime_seconds",
        f"How long the guest stood still in the latest migration; {limit}.",
        now.downtime_seconds,
    )
    yield counter("reconnects", "Times that the latest migration was resumed after a pause.", now.reconnects)


def page_families(now: Figures) -> Iterator[Metric]:
    """Tell what moved, and what is still to move."""
    yield counter("pages", PAGES_TEXT[now.role], {(path,): now.pages.get(path, 0) for path in PATHS}, ("path",))
    text = "Bytes that this agent sent and received in the latest migration, by connection."
    control = (("sent", "control"), ("received", "control"))
    moved = {key: now.transferred.get(key, 0) for key in (*CHANNELS[now.role], *control)}
    yield counter("transferred_bytes", text, moved, ("direction", "channel"))
    yield gauge("remaining_bytes", "Bytes of guest memory that are not at the destination yet.", now.remaining_bytes)


def fault_families(now: Figures) -> Iterator[Metric]:
    """Tell what the guest's touch set off, which only a destination sees."""
    text = "Page faults read from userfaultfd: the page was requested, or joined: on its way or here already."
    every = ((kind, result) for kind in KINDS for result in RESULTS)
    yield counter("faults", text, {key: now.faults.get(key, 0) for key in every}, ("kind", "result"))
    text = "Pages handed to the kernel, by what it said."
    yield counter("placements", text, {(one,): now.placements.get(one, 0) for one in OUTCOMES}, ("result",))
    yield gauge("request_queue_depth", "Faults that wait for their page.", now.queue_depth)
    yield counter("uffd_retries", "Placements that the kernel asked to repeat.", now.retries)
    text = "Fault read by the agent to page placed by it."
    yield from histogram("fault_latency_seconds", text, now.fault_latency or Histogram())


def host_families() -> Iterator[Metric]:
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


def gauge(name: str, text: str, value: float | Samples, labels: Labels = ()) -> Metric:
    """Build a gauge: one number, or numbers by the values of their labels."""
    if not isinstance(value, Mapping):
        return GaugeMetricFamily(_PREFIX + name, text, value=value)
    family = GaugeMetricFamily(_PREFIX + name, text, labels=labels)
    for key, one in value.items():
        family.add_metric(key, one)
    return family


def counter(name: str, text: str, value: float | Samples, labels: Labels = ()) -> Metric:
    """Build a counter, as gauge() does."""
    if not isinstance(value, Mapping):
        return CounterMetricFamily(_PREFIX + name, text, value=value)
    family = CounterMetricFamily(_PREFIX + name, text, labels=labels)
    for key, one in value.items():
        family.add_metric(key, one)
    return family


def histogram(name: str, text: str, recorded: Histogram | None) -> Iterator[Metric]:
    """Build a histogram with QEMU's buckets; none where nothing records one."""
    if recorded is not None:
        yield HistogramMetricFamily(
            _PREFIX + name, text, buckets=recorded.prometheus_buckets(), sum_value=recorded.sum_ns / 1e9
        )


def serve(address: TcpAddress, figures: Callable[[], Figures]) -> str:
    """Serve `/metrics` from a thread of its own until the process ends; return where. UsageError: port taken."""
    if not address.loopback:
        log.warning("metrics: %s:%d is beyond this host: anybody who reaches it may read", address.host, address.port)
    registry = CollectorRegistry()
    registry.register(MigrationCollector(asyncio.get_running_loop(), figures))
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(address.port, addr=address.host, registry=registry)
    except OSError as error:
        raise UsageError(f"cannot serve metrics on {address.host}:{address.port}: {error.strerror or error}") from error
    # The threads that it starts for its clients inherit this.
    os.setpriority(os.PRIO_PROCESS, thread.native_id or 0, SCRAPE_NICE)
    return f"http://{address.host}:{server.server_port}/metrics"
