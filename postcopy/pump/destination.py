"""The owner of the destination's pump: creates it, gives it its connections, reads its counters, ends it.

Nothing here is on the way of a page: the C threads work whether or not Python runs.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from postcopy.errors import HostError, LinkError, UsageError
from postcopy.pages.regions import Layout
from postcopy.pump._pump import ffi, lib
from postcopy.pump.half import Pump, Role
from postcopy.pump.histogram import Histogram, read_histogram
from postcopy.pump.regions import MappedRegion, Placement, Removal, describe
from postcopy.pump.tls import TlsSession
from postcopy.pump.trace import FaultTrace

VIEWS_MAX: int = lib.PUMP_VIEWS_MAX


@dataclass(frozen=True, slots=True)
class DestinationStats:
    """A snapshot of the counters. Pages are counted in each region's own page size; times are seconds.

    The page of `faults_fetched` came as the answer to their own request. Their times are made of three parts, here as
    sums: until the request had left, until its answer was whole, until the page was placed.
    `pages_kept` were here before this pump was: a former one that was killed had placed them.
    """

    pages_total: int
    pages_resident: int
    pages_demand: int
    pages_push: int
    pages_zero: int
    pages_duplicate: int
    pages_removed: int
    pages_handed_over: int
    pages_kept: int
    pages_poisoned: int
    faults_missing: int
    faults_minor: int
    faults_wp: int
    requests: int
    pending: int
    outcomes: dict[str, int]
    views_ended: int
    bytes_received_urgent: int
    bytes_received_push: int
    bytes_sent_urgent: int
    beats: int
    bytes_placed: int
    push_ended: bool
    cpu_seconds: float
    fault_latency: Histogram
    faults_fetched: int
    request_seconds: float
    answer_seconds: float
    place_seconds: float

    @property
    def unsettled(self) -> int:
        """How many faults were read, but had no latency yet; of poisoned pages there is none for ever."""
        return self.faults_missing + self.faults_minor + self.faults_wp - self.fault_latency.count

    OUTCOMES: ClassVar = ("placed", "present", "retry", "gone", "busy")

    @classmethod
    def of_handed_over(cls, layout: Layout) -> DestinationStats:
        """Return what there is to tell of memory that was handed over and needs no pump: all of it is here."""
        counts: dict[str, Any] = {field.name: 0 for field in fields(cls)}
        counts |= dict.fromkeys(("pages_total", "pages_resident", "pages_handed_over"), layout.pages)
        counts |= {"outcomes": dict.fromkeys(cls.OUTCOMES, 0), "push_ended": False, "cpu_seconds": 0.0}
        return cls(**counts | {"fault_latency": Histogram()})


class DestinationPump(Pump):
    """Two threads: one turns faults into requests and places their answers, one places what is pushed.

    `mappings` and the userfaultfd behind `uffd_fd` (non-blocking) must outlive the pump. `foreign`: they are another
    process's, whose removals then have to be told of. `beat_ns` is the tick of the heartbeats on both connections, 0:
    none. `maps` are the addresses of a page map for each region that outlive the pump, which goes on with what a former
    one left there; then no mapping has an alias. Raises HostError where memory or descriptors run out.
    """

    agent, other_agent = "destination", "source"
    resident = (lib.PAGE_PLACED, lib.PAGE_ZERO)

    def __init__(
        self,
        layout: Layout,
        mappings: Sequence[MappedRegion],
        uffd_fd: int,
        *,
        demand: Sequence[Placement],
        push: Sequence[Placement],
        zeropage: Sequence[bool],
        poll_max_ns: int,
        beat_ns: int = 0,
        removal: Sequence[Removal] | None = None,
        foreign: bool = False,
        maps: Sequence[int] | None = None,
    ) -> None:
        self._layout = layout
        self._adopted = False
        self._discarding = threading.Lock()
        self._adding = threading.Lock()
        self._running = threading.Lock()  # held by whoever starts or ends threads, or gives them connections
        self._trace: FaultTrace | None = None
        regions, count = describe(layout, mappings, demand, push, zeropage, removal=removal, foreign=foreign, maps=maps)
        self._pump: Any = lib.destination_create(uffd_fd, regions, count, poll_max_ns)
        if self._pump == ffi.NULL:
            raise HostError(f"the destination's pump could not be created: {os.strerror(ffi.errno)}")
        lib.half_beat(self._half, beat_ns)
        self._kept = int(lib.destination_counters(self._pump).resident)

    @property
    def _half(self) -> Any:
        return lib.destination_half(self._handle)

    def _map(self, region: int) -> Any:
        return lib.destination_map(self._handle, region)

    def adopt(self) -> None:
        """Take note that every page's content is in the files already, and will be mapped as it is touched.

        In place of both connections, before start(). Such a pump serves faults until it is stopped; it fetches nothing.
        """
        result = lib.destination_adopt(self._handle)
        if result:
            raise ValueError(f"adopt: {os.strerror(-result)}")
        self._adopted = True

    def part(self) -> None:
        """Have it start without a source: faults are served with what is here until attach() and resume().

        In place of both connections, before start().
        """
        result = lib.destination_part(self._handle)
        if result:
            raise ValueError(f"part: {os.strerror(-result)}")

    def trace(self, trace: FaultTrace) -> None:
        """Have every fault recorded from the start on; the trace is kept for as long as the pump."""
        if lib.destination_trace(self._handle, trace.pointer):
            raise ValueError("a trace begins before the pump does")
        self._trace = trace

    def attach(self, role: Role, socket_fd: int, tls: TlsSession | None = None) -> None:
        """Hand over a role's connection, as in Pump; not while threads are being ended."""
        with self._running:
            super().attach(role, socket_fd, tls)

    def start(self) -> None:
        """Start both threads; both connections must be there. One thread does where the memory was adopted."""
        with self._running:
            result = lib.destination_start(self._handle)
        if result:
            raise HostError(f"the destination's pump could not be started: {os.strerror(-result)}")

    def detach(self) -> None:
        """Take the connections away, broken or not; the guest goes on with what is here. In a thread: may wait.

        Of pages that came in part nothing is left. LinkError where the pump has failed.
        """
        with self._running:
            result = lib.destination_detach(self._handle)
        if result:
            raise LinkError(f"the destination's pump could not be paused: {os.strerror(-result)}")

    def resume(self) -> None:
        """Go on with connections that were attached anew: what faults wait for is asked for again. In a thread."""
        with self._running:
            result = lib.destination_resume(self._handle)
        if result:
            raise HostError(f"the destination's pump could not go on: {os.strerror(-result)}")

    def poison(self) -> int:
        """Give up every page that is not here, once detached; return how many. Whoever touches one gets SIGBUS.

        HostError where the kernel cannot do that (before 6.6): then whoever touches one waits for ever. In a thread.
        """
        with self._running:
            result = lib.destination_poison(self._handle)
        if result:
            raise HostError(f"pages that are lost could not be poisoned: {os.strerror(-result)}")
        return int(lib.destination_counters(self._handle).poisoned)

    def snapshot(self) -> DestinationStats:
        """Return all counters; costs the C threads nothing."""
        counters = lib.destination_counters(self._handle)
        demand, urgent, push = counters.demand, counters.urgent, counters.push
        placers = (urgent, push, counters.views)
        return DestinationStats(
            pages_total=self._layout.pages,
            pages_resident=counters.resident,
            pages_demand=urgent.pages,
            pages_push=push.pages,
            pages_zero=urgent.zero + push.zero + counters.removed,
            pages_removed=counters.removed,
            pages_handed_over=self._layout.pages if self._adopted else 0,
            pages_kept=self._kept,
            pages_poisoned=counters.poisoned,
            pages_duplicate=urgent.duplicate + push.duplicate,
            faults_missing=demand.faults_missing,
            faults_minor=demand.faults_minor,
            faults_wp=demand.faults_wp,
            requests=demand.requests,
            pending=demand.pending,
            outcomes={
                outcome: sum(getattr(placer, f"outcome_{outcome}") for placer in placers)
                for outcome in DestinationStats.OUTCOMES
            },
            views_ended=counters.views_ended,
            bytes_received_urgent=urgent.bytes_received,
            bytes_received_push=push.bytes_received,
            bytes_sent_urgent=demand.bytes_sent,
            bytes_placed=0 if self._adopted else urgent.bytes_placed + push.bytes_placed,
            beats=urgent.beats + push.beats,
            push_ended=bool(push.ended),
            cpu_seconds=self._cpu_seconds,
            fault_latency=read_histogram(ffi, demand.latency),
            faults_fetched=demand.fetched,
            request_seconds=demand.request_ns / 1e9,
            answer_seconds=demand.answer_ns / 1e9,
            place_seconds=demand.place_ns / 1e9,
        )

    def progress(self) -> tuple[int, int]:
        """Return pages resident, and faults that wait for their page: two of the counters."""
        counters = lib.destination_counters(self._handle)
        return counters.resident, counters.demand.pending

    def glance(self) -> tuple[int, int, bytes]:
        """Return pages resident, bytes received and the words of the latency's histogram: a look that costs little."""
        counters = lib.destination_counters(self._handle)
        received = counters.urgent.bytes_received + counters.push.bytes_received
        return counters.resident, received, bytes(ffi.buffer(ffi.addressof(counters.demand.latency)))

    def discard(self, region: int, offset: int, length: int) -> None:
        """Take note that the guest gives these bytes (whole pages) back: what is not placed yet is zeros from now on.

        When it returns no late copy comes any more, so whoever calls it takes the memory's own content away after it
        (Mapping.punch_hole), not before. It waits for a page that is being placed just now. Raises UsageError (outside
        of the region, no whole pages), LinkError where the pump ended before such a page had come. Any thread may call
        it; once the pump is closed it does nothing, for nothing is placed any more.
        """
        with self._discarding:
            if self._pump == ffi.NULL:
                return
            result = lib.destination_discard(self._pump, region, offset, length)
        if result == -errno.EINVAL:
            raise UsageError(f"region {region}: {length} bytes at {offset:#x} are no whole pages of it")
        if result:
            raise LinkError(f"region {region}: the pump ended while {length} bytes at {offset:#x} were given back")

    def add_view(self, uffd_fd: int, addresses: Sequence[int]) -> None:
        """Serve another process, too, that maps the regions' files at `addresses` (0: not that one) and traps them.

        Its userfaultfd (non-blocking, without events) must outlive the pump. Raises UsageError: a region without a
        file, an address within a page, or VIEWS_MAX others are served already. Any thread may call it.
        """
        bases = ffi.new("uint64_t[]", list(addresses))
        with self._adding:
            result = lib.destination_view(self._handle, uffd_fd, bases, len(addresses))
        if result == -errno.ENOSPC:
            raise UsageError(f"{VIEWS_MAX} other processes were given to this migration already")
        if result:
            raise UsageError("a view needs one address of whole pages for each region, 0 for one without a file")

    def stop(self) -> None:
        """End both threads and wait for them. Idempotent. Faults raised from now on wait.

        Any thread may call it: where another one is in detach(), resume() or poison(), that is over first.
        """
        with self._running:
            if self._pump != ffi.NULL:
                lib.destination_stop(self._pump)

    def close(self) -> None:
        """Stop, close the connections, free the memory. Idempotent."""
        self.stop()  # which ends a discard(), too
        with self._discarding, self._adding, self._running:
            pump, self._pump = self._pump, ffi.NULL
            lib.destination_destroy(pump)
