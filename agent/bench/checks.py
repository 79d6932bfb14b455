"""An honest bench: what must hold of every run, whatever its figures. Pure: a run's accounts in, complaints out.

The guest's clock and the agent's measure the same faults independently, Prometheus is told by a third way, and every
byte was compared. Where these do not agree, the run says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Both histograms know a value to one part in 32, so a pair of them to two.
RESOLUTION = 2 / 32
# What lies between the two clocks: a thread is woken to read the fault, and the vCPU once the page is there. Waking an
# idle virtual CPU was seen to take 35 to 50 microseconds.
QUEUE_SECONDS = 100e-6
# In the tail either waits for a CPU that somebody else has just been given for a slice.
SLICE_SECONDS = 4e-3
# Below, percentiles say nothing.
FAULTS_MIN = 100
# Of the scrapes that there should have been: with fewer, nobody knows what they would have cost.
SCRAPES_MIN = 0.5
# Accesses that are no faults and took a microsecond: beyond this part of all, they are what the percentiles show.
OTHER_STALLS_MAX = 0.25


def complaints(
    report: Mapping[str, Any], metrics: Mapping[str, float], *, vcpus: int, push: bool, disturbed: bool = False
) -> list[str]:
    """Return what is wrong with a run of the product; `metrics` may be empty where nobody could ask for them.

    `disturbed`: others used the CPUs, so any thread may have waited for a slice of theirs to end.
    """
    found = []
    integrity, pages = report["integrity"], report["pages"]
    if integrity["pages_mismatched"]:
        found.append(f"{integrity['pages_mismatched']} of {integrity['pages_checked']} pages differ")
    if not integrity["pages_checked"]:
        found.append("no page was checked")
    if pages["demand"] + pages["push"] + pages["zero"] + pages.get("handed_over", 0) != pages["total"]:
        found.append(f"pages do not add up: {pages}")
    if pages.get("handed_over") and any(report["bytes"].values()):
        found.append(f"memory was handed over, and bytes of it moved: {report['bytes']}")
    if not push and pages["push"]:
        found.append(f"{pages['push']} pages were pushed without a push")
    if metrics:
        faults, recorded = metrics.get("postcopy_faults_total"), metrics.get("postcopy_fault_latency_seconds_count")
        if faults is None or faults != recorded:
            found.append(f"faults_total is {faults}, the latency histogram holds {recorded}")
    queue = SLICE_SECONDS if disturbed else QUEUE_SECONDS
    return found + disagreement(report["fault_latency_seconds"], report["stall_seconds"], vcpus, queue)


def disagreement(
    faults: Mapping[str, float], stalls: Mapping[str, float], vcpus: int, queue: float = QUEUE_SECONDS
) -> list[str]:
    """Return how the guest's stalls and the agent's faults contradict each other.

    Each fault is one access of one vCPU. With many vCPUs each waits for the others' faults, too.
    """
    if stalls["count"] + vcpus < faults["count"]:
        return [f"the guest felt {stalls['count']} stalls, the agent served {faults['count']} faults"]
    if faults["count"] < FAULTS_MIN or stalls["count"] - faults["count"] > OTHER_STALLS_MAX * stalls["count"]:
        return []
    found = []
    for name, waiting in (("p50", queue), ("p99", queue + SLICE_SECONDS)):
        fault, stall = faults[name], stalls[name]
        if abs(stall - fault) > RESOLUTION * max(stall, fault) + vcpus * waiting:
            found.append(f"{name} of the guest's stalls is {stall:.3g} s, of the agent's faults {fault:.3g} s")
    return found


def residency(placed: int, touched: int, demand: int) -> list[str]:
    """Return what is wrong with a migration that stood without a push until its guest had come to rest for good."""
    found = []
    if placed != touched:
        found.append(f"{placed} pages were resident before the push, the guest touched {touched}")
    if demand != touched:
        found.append(f"{demand} pages were demanded, the guest touched {touched}")
    return found


def scraping(answers: int, wanted: float, ends: int = 2) -> list[str]:
    """Return what is wrong with a run whose metrics should have been read so often, at each of its ends."""
    # An end is asked for the first time after a period.
    if answers < SCRAPES_MIN * (wanted - ends):
        return [f"metrics were answered {answers} times, {wanted:.0f} times would have been the rate"]
    return []


def floor_complaints(checked: int, mismatched: int, resident: int, expected_resident: int) -> list[str]:
    """Return what is wrong with a run of the floor."""
    found = []
    if mismatched or not checked:
        found.append(f"floor: {mismatched} of {checked} pages differ")
    if resident != expected_resident:
        found.append(f"floor: {resident} pages are resident, {expected_resident} should be")
    return found
