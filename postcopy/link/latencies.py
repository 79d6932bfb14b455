"""Histograms as the pump and the guest's vCPUs have them, made what travels: see postcopy/wire/latencies.py."""

from __future__ import annotations

from itertools import compress

from postcopy.limits import HISTOGRAM_VCPUS_MAX
from postcopy.link.guest import MigratingGuest
from postcopy.pump.histogram import BUCKETS, Histogram
from postcopy.wire.latencies import Latencies, SparseHistogram


def latencies(faults: Histogram, guest: MigratingGuest | None) -> Latencies:
    """Return what to tell of the faults of a guest, and of its vCPUs' stalls where it clocks them one by one.

    It is made while the guest waits for pages, so of very many vCPUs nothing is told.
    """
    few = guest is not None and guest.vcpus <= HISTOGRAM_VCPUS_MAX
    stalls = getattr(guest, "stall_per_vcpu", ()) if few else ()
    return Latencies(sparse(faults), tuple(map(sparse, stalls)))


def sparse(recorded: Histogram) -> SparseHistogram:
    """Return a histogram as it travels."""
    first, counts = recorded.span()
    numbers = compress(range(first, BUCKETS), counts)
    return SparseHistogram(tuple(zip(numbers, filter(None, counts), strict=True)), recorded.sum_ns, recorded.max_ns)
