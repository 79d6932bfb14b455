"""One look at a daemon, for whoever watches a migration: totals and whole histograms, of which two looks make rates.

Figures, the guest and what its destination told of it enter; plain data leaves, times as CLOCK_MONOTONIC of the
daemon's host. How long faults and vCPUs wait is of where the guest runs, as far as that is known here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from agent.metrics import Figures
from postcopy.guest.vcpus import WorkloadGuest
from postcopy.link.source import Source
from postcopy.pump.histogram import Histogram
from postcopy.wire.latencies import Latencies, SparseHistogram

# Pieces of memory of which is told how much is at the destination, as far as this side knows.
CELLS = 256


def look(
    now: Figures, size: int, guest: WorkloadGuest | None, residency: list[float], source: Source | None = None
) -> dict[str, Any]:
    """Return the answer to `look`; `size` is the memory's, in bytes, `source` that by which its guest may have left."""
    told = source.latencies if source is not None and guest is None else None
    return {
        "schema_version": 1,
        "at_seconds": time.monotonic(),
        "role": now.role,
        "state": now.state.value,
        "owns_guest": now.owns_guest,
        "memory_bytes": size,
        "remaining_bytes": now.remaining_bytes,
        "pages": {path: count for (_, path), count in now.counts.pages.items()},
        "transferred_bytes": {
            way: sum(count for (direction, _), count in now.counts.transferred.items() if direction == way)
            for way in ("sent", "received")
        },
        "waiting_faults": now.queue_depth,
        **(_own_latencies(now, guest) if told is None else _told_latencies(*told)),
        "residency": [round(part, 3) for part in residency],
    }


def _own_latencies(now: Figures, guest: WorkloadGuest | None) -> Mapping[str, Any]:
    """Return what was measured here."""
    return {
        "latencies_told_at_seconds": None,
        "fault_latency": (now.counts.fault_latency or Histogram()).sparse(),
        "stall_per_vcpu": [stall.sparse() for stall in guest.stall_per_vcpu] if guest is not None else [],
    }


def _told_latencies(at: float, told: Latencies) -> Mapping[str, Any]:
    """Return what the destination has told, and when that was."""
    return {
        "latencies_told_at_seconds": at,
        "fault_latency": _plain(told.faults),
        "stall_per_vcpu": [_plain(stall) for stall in told.stalls],
    }


def _plain(histogram: SparseHistogram) -> Mapping[str, Any]:
    """Return what Histogram.sparse() would."""
    buckets = [list(pair) for pair in histogram.buckets]
    return {"buckets": buckets, "sum_ns": histogram.sum_ns, "max_ns": histogram.max_ns}
