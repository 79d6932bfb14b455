"""The owner of the source's pump: it orders what is pushed and reads the counters; answering requests is C's alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from postcopy.errors import HostError
from postcopy.pages.bitmap import Bitmap
from postcopy.pages.regions import Layout
from postcopy.plan.push import PushExtent
from postcopy.pump._pump import ffi, lib
from postcopy.pump.half import Pump
from postcopy.pump.regions import MappedRegion, describe

RING_EXTENTS: int = lib.PUMP_RING_EXTENTS
# Payload of one pushed frame: small enough that the destination's staging buffer stays in its CPU's cache.
PUSH_FRAME_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class SourceStats:
    """A snapshot of the counters. Pages are counted in each region's own page size; times are seconds.

    `answer_seconds` is the sum over the requests whose answers have left, from the reading of each to its last byte.
    """

    pages_demand: int
    pages_push: int
    pages_zero: int
    pages_again: int
    requests: int
    requests_ignored: int
    requests_answered: int
    answer_seconds: float
    bytes_sent_urgent: int
    bytes_sent_push: int
    queued: int
    cpu_seconds: float

    def plus(self, later: SourceStats) -> SourceStats:
        """Return the counters of two pumps of one migration, of which the later one is still there."""
        sums = {field.name: getattr(self, field.name) + getattr(later, field.name) for field in fields(self)}
        return SourceStats(**{**sums, "queued": later.queued})


class SourcePump(Pump):
    """Two threads: one answers requests out of the guest's memory, one pushes the extents it is given.

    The guest must be stopped: its memory is sent as it lies there. `mappings` must outlive the pump. `beat_ns` is the
    tick of the heartbeats on both connections, 0: none.
    """

    agent, other_agent = "source", "destination"
    resident = (lib.SENT_PUSH, lib.SENT_DEMAND, lib.SENT_HOLE)

    def __init__(
        self,
        layout: Layout,
        mappings: Sequence[MappedRegion],
        *,
        poll_max_ns: int,
        beat_ns: int = 0,
        frame_bytes: int = PUSH_FRAME_BYTES,
    ) -> None:
        self._layout = layout
        regions, count = describe(layout, mappings)
        self._pump: Any = lib.source_create(regions, count, poll_max_ns, frame_bytes)
        if self._pump == ffi.NULL:
            raise HostError(f"the source's pump could not be created: {os.strerror(ffi.errno)}")
        lib.half_beat(self._half, beat_ns)

    @property
    def _half(self) -> Any:
        return lib.source_half(self._handle)

    def _map(self, region: int) -> Any:
        return lib.source_map(self._handle, region)

    def start(self) -> None:
        """Start both threads; both connections must be there."""
        result = lib.source_start(self._handle)
        if result:
            raise HostError(f"the source's pump could not be started: {os.strerror(-result)}")

    def skip(self, region: int, first: int, has: Bitmap) -> None:
        """Push none of these pages of a region, bit 0 being page `first`: the destination has them. Before start."""
        if lib.source_skip(self._handle, region, first, len(has), has.to_bytes()):
            raise ValueError(f"region {region} has no {len(has)} pages from page {first} on")

    def guest_stopped(self) -> None:
        """Say that the guest stands still for good; no byte of its memory is read before."""
        lib.source_guest_stopped(self._handle)

    def push(self, extents: Sequence[PushExtent]) -> int:
        """Queue extents for the push, in order; return how many of them the ring had room for."""
        orders = ffi.new("struct push_extent[]", len(extents))
        for order, extent in zip(orders, extents, strict=True):
            order.region, order.offset, order.length = extent.region, extent.offset, extent.length
            order.zero = extent.zero
        accepted: int = lib.source_push(self._handle, orders, len(extents))
        if accepted == -errno.EBUSY:
            raise RuntimeError("the push begins when the guest has stopped")
        if accepted < 0:
            raise ValueError(f"an extent is no run of pages of its region: {extents}")
        return accepted

    def push_end(self) -> None:
        """Say that nothing more will be queued; the last frame of the push is END."""
        lib.source_push_end(self._handle)

    def demanded(self) -> tuple[int, int] | None:
        """Return region and offset of the latest page that was asked for since the last call, None where none was."""
        region, offset = ffi.new("uint32_t *"), ffi.new("uint64_t *")
        return (region[0], offset[0]) if lib.source_wanted(self._handle, region, offset) else None

    @property
    def low_fd(self) -> int:
        """Readable (an eventfd) when the ring has run low since the last push()."""
        return int(lib.source_low_fd(self._handle))

    def snapshot(self) -> SourceStats:
        """Return all counters; costs the C threads nothing."""
        counters = lib.source_counters(self._handle)
        urgent, push = counters.urgent, counters.push
        return SourceStats(
            pages_demand=urgent.pages,
            pages_push=push.pages,
            pages_zero=urgent.zero + push.zero,
            pages_again=urgent.again,
            requests=urgent.requests,
            requests_ignored=urgent.ignored,
            requests_answered=urgent.answered,
            answer_seconds=urgent.answer_ns / 1e9,
            bytes_sent_urgent=urgent.bytes_sent,
            bytes_sent_push=push.bytes_sent,
            queued=lib.source_queued(self._handle),
            cpu_seconds=self._cpu_seconds,
        )

    def stop(self) -> None:
        """End both threads and wait for them. Idempotent."""
        if self._pump != ffi.NULL:
            lib.source_stop(self._pump)

    def close(self) -> None:
        """Stop, close the connections, free the memory. Idempotent."""
        pump, self._pump = self._pump, ffi.NULL
        lib.source_destroy(pump)
