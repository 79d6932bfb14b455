"""One migration in windows: how long faults took while its agents were asked for metrics, and while they were not.

A trace of faults enters; both halves leave. Two runs differ by more than being asked costs, two windows of one do not.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from statistics import quantiles

from agent.bench.scrape import Scraped, asks
from postcopy.errors import HostError

RECORD = struct.Struct("<IIQ")  # see postcopy/pump/trace.py
# No multiple of an agent's rounds, nor of a period: their phase is another one in each window.
WINDOW_NS = 370_000_000
# What was asked for at the end of a window is answered at the beginning of the next one.
SETTLED_NS = 120_000_000
# Below, a half says nothing about one fault in a hundred.
FAULTS_MIN = 2000


def figures_of_windows(file: Path, scraped: Scraped) -> dict[str, float]:
    """Return how many times the p50 and the p99 of the faults while nobody asked those while somebody did are.

    HostError where the trace holds too little of either, or not all.
    """
    asked, alone = halves(file.read_bytes(), scraped)
    if min(len(asked), len(alone)) < FAULTS_MIN:
        raise HostError(f"too few faults: {len(asked)} while metrics were asked for, {len(alone)} while not")
    (asked_p50, asked_p99), (alone_p50, alone_p99) = percentiles(asked), percentiles(alone)
    return {"asked_p50": asked_p50 / alone_p50, "asked_p99": asked_p99 / alone_p99}


def halves(trace: bytes, scraped: Scraped) -> tuple[list[int], list[int]]:
    """Return the latencies, in nanoseconds, of the faults in windows with questions and of those in the others.

    Of the windows that lie wholly between the first question and the last, as many of one sort as of the other.
    """
    line, _, records = trace.partition(b"\n")
    head = json.loads(line)
    if head["lost"]:
        raise HostError(f"{head['lost']} faults did not fit into the trace: those that did are no whole windows")
    first, stop = -(-scraped.since_ns // WINDOW_NS), scraped.until_ns // WINDOW_NS
    stop -= (stop - first) % 2
    found: tuple[list[int], list[int]] = ([], [])
    for at_us, latency_ns, _ in RECORD.iter_unpack(records):
        at_ns = head["began_ns"] + 1000 * at_us
        if first <= at_ns // WINDOW_NS < stop and at_ns % WINDOW_NS >= SETTLED_NS:
            found[not asks(at_ns, WINDOW_NS)].append(latency_ns)
    return found


def percentiles(latencies: list[int]) -> tuple[float, float]:
    """Return the 50th and the 99th percentile."""
    found = quantiles(latencies, n=100)
    return found[49], found[98]
