"""Prometheus metrics of a daemon: read when they are asked for, never on the way of a page.

Figures of the pump, the guest and the session enter through `Figures`; metric families leave. The scrape runs in the
HTTP server's thread, so it asks the event loop's thread for the figures: nothing is read while it is being freed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from postcopy import __version__
from postcopy.errors import UsageError
from postcopy.link.address import TcpAddress
from postcopy.pump.histogram import Histogram
from postcopy.session.states import State

SCRAPE_SECONDS = 5.0
_PREFIX = "postcopy_"


@dataclass
class Figures:
    """What a daemon has to tell, at one moment. Counts are of the latest migration but for `migrations`.

    Keys of the mappings are label values: faults by kind, placements by outcome, pages by path, bytes by
    (direction, channel), migrations by (role, mode, outcome).
    """

    state: State = State.NONE
    migrations: dict[tuple[str, str, str], int] = field(default_factory=dict)
    duration_seconds: float = 0.0
    downtime_seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    placements: dict[str, int] = field(default_factory=dict)
    fault_latency: Histogram | None = None
    stall: Histogram | None = None
    pages: dict[str, int] = field(default_factory=dict)
    transferred: dict[tuple[str, str], int] = field(default_factory=dict)
    remaining_bytes: int = 0
    queue_depth: int = 0
    retries: int = 0


class MigrationCollector(Collector):
    """Turns Figures into families. `figures` is called in the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, figures: Callable[[], Figures]) -> None:
        self._loop = loop
        self._figures = figures

    def describe(self) -> list[Metric]:
        """Name nothing ahead: the registry must not read a pump that is not there yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read once, then tell all of it."""
        now = asyncio.run_coroutine_threadsafe(self._read(), self._loop).result(SCRAPE_SECONDS)
        yield from session_families(now)
        yield from page_families(now)
        yield from time_families(now)

    async def _read(self) -> Figures:
        return self._figures()


def session_families(now: Figures) -> Iterator[Metric]:
    """Tell where migrations stand and what became of them."""
    build = GaugeMetricFamily(_PREFIX + "build_info", "What this agent is; always 1.", labels=["version"])
    build.add_metric([__version__], 1)
    yield build
    state = GaugeMetricFamily(_PREFIX + "migration_state", "1 for the state the migration is in.", labels=["state"])
    for one in State:
        state.add_metric([one.value], float(one is now.state))
    yield state
    ended = CounterMetricFamily(
        _PREFIX + "migrations", "Migrations that ended, by outcome.", labels=["role", "mode", "outcome"]
    )
    for key, count in now.migrations.items():
        ended.add_metric(list(key), count)
    yield ended
    yield gauge(
        "migration_duration_seconds", "From the start of the latest migration to its last page.", now.duration_seconds
    )
    yield gauge(
        "migration_downtime_seconds", "How long the guest stood still in the latest migration.", now.downtime_seconds
    )
    yield counter("reconnects", "Connections that were made anew within a migration.", {}, 0)


def page_families(now: Figures) -> Iterator[Metric]:
    """Tell what moved, and what is still to move."""
    yield counter(
        "faults", "Page faults read from userfaultfd.", {(kind,): n for kind, n in now.faults.items()}, ["kind"]
    )
    yield counter(
        "placements",
        "Pages handed to the kernel, by what it said.",
        {(o,): n for o, n in now.placements.items()},
        ["result"],
    )
    yield counter(
        "pages", "Pages that arrived, by the way they came.", {(p,): n for p, n in now.pages.items()}, ["path"]
    )
    yield counter("transferred_bytes", "Bytes on data connections.", now.transferred, ["direction", "channel"])
    yield gauge("remaining_bytes", "Bytes of guest memory that are not at the destination yet.", now.remaining_bytes)
    yield gauge("request_queue_depth", "Faults that wait for their page.", now.queue_depth)
    yield counter("uffd_retries", "Placements that the kernel asked to repeat.", {}, now.retries)


def time_families(now: Figures) -> Iterator[Metric]:
    """Tell how long faults took, and how long the guest felt them."""
    yield from histogram("fault_latency_seconds", "Fault read to page placed, as the agent sees it.", now.fault_latency)
    yield from histogram("stall_seconds", "The guest's own accesses of 1 microsecond or more.", now.stall)


def gauge(name: str, text: str, value: float) -> Metric:
    """Build a gauge without labels."""
    return GaugeMetricFamily(_PREFIX + name, text, value=value)


def counter(name: str, text: str, values: dict[Any, int], labels: list[str] | int) -> Metric:
    """Build a counter: with labels from `values`, or the one number given in place of labels."""
    if isinstance(labels, int):
        return CounterMetricFamily(_PREFIX + name, text, value=labels)
    family = CounterMetricFamily(_PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


def histogram(name: str, text: str, recorded: Histogram | None) -> Iterator[Metric]:
    """Build a histogram with QEMU's buckets; none where nothing records one."""
    if recorded is not None:
        yield HistogramMetricFamily(
            _PREFIX + name, text, buckets=recorded.prometheus_buckets(), sum_value=recorded.sum_ns / 1e9
        )


def serve(address: TcpAddress, figures: Callable[[], Figures]) -> str:
    """Serve `/metrics` from a thread of its own until the process ends; return where. UsageError: port taken."""
    registry = CollectorRegistry()
    registry.register(MigrationCollector(asyncio.get_running_loop(), figures))
    try:
        server, _ = start_http_server(address.port, addr=address.host, registry=registry)
    except OSError as error:
        raise UsageError(f"cannot serve metrics on {address.host}:{address.port}: {error.strerror or error}") from error
    return f"http://{address.host}:{server.server_port}/metrics"
