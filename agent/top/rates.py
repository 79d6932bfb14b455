"""From looks at an agent to what people watch: rates, percentiles of the latest moment and overall, the time to go.

Pure: looks enter in their order, one map for each leaves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from postcopy.pump.histogram import Histogram

# The time to go follows the latest looks, not a single one.
LOOKS_FOR_PACE = 5

Look = Mapping[str, Any]


class Watch:
    """Remembers the looks that it needs. What was counted before the first look is part of the totals alone."""

    def __init__(self) -> None:
        self._latest: Look | None = None
        self._compared: Look | None = None
        self._moving: deque[Look] = deque(maxlen=LOOKS_FOR_PACE + 1)

    def take(self, look: Look) -> dict[str, Any]:
        """Return what the latest look shows beside those before it."""
        before = self._latest
        if before is None or began_anew(before, look):
            before = look
        felt = self._compared = self._compare(before, look)
        self._latest = look
        self._follow(look)
        seconds = look["at_seconds"] - before["at_seconds"]
        return {
            "schema_version": 1,
            **{key: look[key] for key in ("role", "state", "owns_guest", "memory_bytes", "remaining_bytes")},
            "resident": 1 - look["remaining_bytes"] / look["memory_bytes"] if look["memory_bytes"] else 0.0,
            "to_go_seconds": self._to_go(),
            "pages": look["pages"],
            "pages_per_second": rates(before["pages"], look["pages"], seconds),
            "bytes_per_second": rates(before["transferred_bytes"], look["transferred_bytes"], seconds),
            "faults_per_second": max(0.0, rate(faults(felt), faults(look), known_at(look) - known_at(felt))),
            "waiting_faults": look["waiting_faults"],
            "fault_latency_seconds": times(felt["fault_latency"], look["fault_latency"]),
            "fault_latency_octaves": octaves(felt["fault_latency"], look["fault_latency"]),
            "stall_seconds_per_vcpu": stalls(felt["stall_per_vcpu"], look["stall_per_vcpu"]),
            "residency": look["residency"],
        }

    def _compare(self, before: Look, look: Look) -> Look:
        """Return the look since which the latest faults and stalls are shown.

        What is told from far comes twice a second: between two such words the latest moment stays the one before. Those
        of another place have nothing to do with each other.
        """
        if before is look or is_told(before) is not is_told(look):
            return look
        nothing_new = is_told(look) and known_at(before) == known_at(look)
        if nothing_new and look["state"] == "postcopy-active" and self._compared is not None:
            return self._compared
        return before

    def _follow(self, look: Look) -> None:
        """Keep the looks that the pace is made of: those since the pages of this migration began to move."""
        moves = look["state"] == "postcopy-active"
        if not moves or (self._moving and look["remaining_bytes"] > self._moving[-1]["remaining_bytes"]):
            self._moving.clear()
        if moves:
            self._moving.append(look)

    def _to_go(self) -> float | None:
        """Return how long it takes until every page is there, at the pace of the latest looks; None: nobody knows."""
        if not self._moving or not self._moving[-1]["remaining_bytes"]:
            return None
        first, last = self._moving[0], self._moving[-1]
        moved = first["remaining_bytes"] - last["remaining_bytes"]
        seconds = last["at_seconds"] - first["at_seconds"]
        return last["remaining_bytes"] * seconds / moved if moved > 0 else None


def began_anew(before: Look, now: Look) -> bool:
    """Whether the counters are of another migration."""
    if any(now["pages"].get(path, 0) < count for path, count in before["pages"].items()):
        return True
    return not is_told(now) and faults(now) < faults(before)


def is_told(look: Look) -> bool:
    """Whether faults and stalls are of another agent, which told of them."""
    return look["latencies_told_at_seconds"] is not None


def known_at(look: Look) -> float:
    """Return the moment up to which faults and stalls are known."""
    told_at: float | None = look["latencies_told_at_seconds"]
    at: float = look["at_seconds"]
    return at if told_at is None else told_at


def faults(look: Look) -> int:
    """Return how many faults were served."""
    return sum(count for _, count in look["fault_latency"]["buckets"])


def rate(before: float, now: float, seconds: float) -> float:
    """Return a rise a second; 0 at the first look."""
    return (now - before) / seconds if seconds > 0 else 0.0


def rates(before: Mapping[str, int], now: Mapping[str, int], seconds: float) -> dict[str, float]:
    """Return the rise a second of each count."""
    return {name: rate(before.get(name, 0), count, seconds) for name, count in now.items()}


def times(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the figures of what was recorded since the look before, and of everything."""
    latest, overall = recorded(before, now)
    return {"latest": latest.summary(), "overall": overall.summary()}


def recorded(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Histogram, Histogram]:
    """Return the histograms of what was recorded since the look before, and of everything.

    Where a count has gone back they are not of one and the same thing: nothing is known of the latest moment then.
    """
    overall = Histogram.from_sparse(now)
    latest = overall.since(Histogram.from_sparse(before))
    return (latest if min(latest.buckets) >= 0 <= latest.sum_ns else Histogram()), overall


def stalls(before: list[Mapping[str, Any]], now: list[Mapping[str, Any]]) -> list[dict[str, dict[str, float]]]:
    """Return the same for each vCPU; one that was not here at the look before has no latest moment."""
    known = before if len(before) == len(now) else now
    return [times(*pair) for pair in zip(known, now, strict=True)]


def octaves(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[tuple[float | None, int]]]:
    """Return (upper bound in seconds, faults) of each power of two of a microsecond, as times() does.

    The last one has no bound: None, for JSON has no word for what is endless.
    """
    latest, overall = recorded(before, now)
    return {"latest": bars(latest), "overall": bars(overall)}


def bars(histogram: Histogram) -> list[tuple[float | None, int]]:
    """Return (upper bound, count) of each octave of a histogram."""
    below = 0.0
    found = []
    for le, count in histogram.prometheus_buckets():
        found.append((float(le) if le != "+Inf" else None, int(count - below)))
        below = count
    return found
