"""Histograms as the pump and the guest's vCPUs have them, made what travels: see postcopy/wire/latencies.py."""

from __future__ import annotations

import logging
from itertools import compress

from postcopy.limits import HISTOGRAM_VCPUS_MAX
from postcopy.link.guest import MigratingGuest
from postcopy.pump.histogram import BUCKETS, Histogram
from postcopy.wire.latencies import Latencies, SparseHistogram, fits

log = logging.getLogger("postcopy.session")


def latencies(faults: Histogram, guest: MigratingGuest | None) -> Latencies:
    """Return what to tell of the faults of a guest, and of its vCPUs' stalls where it clocks them one by one.

    It is made while the guest waits for pages, so of one with very many vCPUs no stalls are told.
    """
    return Latencies(sparse(faults), stalls_of(guest))


def stalls_of(guest: MigratingGuest | None) -> tuple[SparseHistogram, ...]:
    """Return the stalls of each vCPU; none where a guest tells none, or what cannot be told.

    A running guest is not lost for a picture of it: whatever a class of guests has under that name does no harm.
    """
    try:
        stalls = getattr(guest, "stall_per_vcpu", ())
        if len(stalls) > HISTOGRAM_VCPUS_MAX:
            return ()
        told = tuple(map(sparse, stalls))
        return told if all(map(fits, told)) else ()
    except Exception:
        log.debug("the stalls of the guest's vCPUs cannot be told", exc_info=True)
        return ()


def sparse(recorded: Histogram) -> SparseHistogram:
    """Return a histogram as it travels."""
    first, counts = recorded.span()
    numbers = compress(range(first, BUCKETS), counts)
    return SparseHistogram(tuple(zip(numbers, filter(None, counts), strict=True)), recorded.sum_ns, recorded.max_ns)
