"""One look at a daemon, for whoever watches a migration: totals and whole histograms, of which two looks make rates.

Figures and the guest enter; plain data leaves, times as CLOCK_MONOTONIC of the daemon's host.
"""

from __future__ import annotations

import time
from typing import Any

from agent.metrics import Figures
from postcopy.guest.vcpus import WorkloadGuest
from postcopy.pump.histogram import Histogram

# Pieces of memory of which is told how much is at the destination, as far as this side knows.
CELLS = 256


def look(now: Figures, size: int, guest: WorkloadGuest | None, residency: list[float]) -> dict[str, Any]:
    """Return the answer to `look`; `size` is the memory's, in bytes."""
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
        "fault_latency": (now.counts.fault_latency or Histogram()).sparse(),
        "stall_per_vcpu": [stall.sparse() for stall in guest.stall_per_vcpu] if guest is not None else [],
        "residency": [round(part, 3) for part in residency],
    }
