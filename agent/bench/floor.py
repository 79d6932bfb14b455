"""The floor, run from Python: a setup in, what it took out. Each run is a process of its own with a deadline.

A thread that waits in a page fault which nobody serves can only be ended with its process, so no floor runs inside the
caller's. `python -m agent.bench.floor` is that process: it reads one setup as JSON on stdin and writes one result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from agent.bench._floor import ffi, lib
from postcopy.errors import HostError
from postcopy.pump.histogram import BUCKETS, Histogram, read_histogram

Way = Literal["none", "copy", "continue", "write"]
_WAYS: dict[Way, int] = {
    "none": lib.FLOOR_NONE,
    "copy": lib.FLOOR_COPY,
    "continue": lib.FLOOR_CONTINUE,
    "write": lib.FLOOR_WRITE,
}
TOUCHERS_MAX: int = lib.FLOOR_TOUCHERS_MAX
_ALL = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class FloorSetup:
    """What one run of the floor does: see floor.h. Sizes are bytes, `pacing` bytes a second, CPUs bit masks (0: any).

    `poll_ns` is its way of waiting: 0 blocks at once. `touches` None: every page. `period_ns` paces each toucher.
    """

    size: int
    page_size: int = 4096
    touchers: int = 1
    touches: int | None = None
    period_ns: int = 0
    demand: Way = "copy"
    push: Way = "none"
    poll_ns: int = 0
    frame_bytes: int = 256 * 1024
    send_bytes: int = 0
    receive_bytes: int = 0
    anonymous: bool = False
    pacing: int = 0
    source_cpus: int = 0
    destination_cpus: int = 0
    source_netns: str | None = None
    destination_netns: str | None = None
    host: str = "127.0.0.1"
    seed: int = 1

    def framed(self) -> FloorSetup:
        """Return the same with frames that hold whole pages."""
        return replace(self, frame_bytes=max(self.frame_bytes, self.page_size))


@dataclass(frozen=True, slots=True)
class FloorResult:
    """What one run took. Times are seconds; CPU time is that of the threads that carry pages, not the touchers'."""

    wall_seconds: float
    source_cpu_seconds: float
    destination_cpu_seconds: float
    pages_demand: int
    pages_push: int
    bytes_wire: int
    pages_resident: int
    pages_touched: int
    pages_checked: int
    pages_mismatched: int
    latency: Histogram
    stall_per_toucher: tuple[Histogram, ...]

    @property
    def stall(self) -> Histogram:
        """The touches of all touchers that took a microsecond or longer."""
        total = Histogram()
        for one in self.stall_per_toucher:
            total = total.merge(one)
        return total


def run_floor(setup: FloorSetup, deadline: float = 30.0) -> FloorResult:
    """Run the floor once in a fresh process; HostError where this host cannot, or it did not end in time."""
    command = [sys.executable, "-m", "agent.bench.floor"]
    try:
        ended = subprocess.run(
            command,
            input=json.dumps(asdict(setup.framed())).encode(),
            capture_output=True,
            timeout=deadline,
            check=False,
            start_new_session=True,  # as the product's daemons: the scheduler treats each session as a group
        )
    except subprocess.TimeoutExpired:
        raise HostError(f"the floor did not end within {deadline:g} s") from None
    if ended.returncode:
        lines = ended.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {ended.returncode}"]
        raise HostError(f"the floor failed: {lines[-1]}")
    fields = json.loads(ended.stdout)
    fields["latency"] = _histogram_of(fields["latency"])
    fields["stall_per_toucher"] = tuple(map(_histogram_of, fields["stall_per_toucher"]))
    return FloorResult(**fields)


# ---- in the process of its own ----------------------------------------------------------------------------------


def _measure(setup: FloorSetup) -> dict[str, Any]:
    names = ("source_netns", "destination_netns", "host")
    texts = {name: ffi.new("char[]", value.encode()) for name in names if (value := getattr(setup, name))}
    fields = asdict(setup) | {
        "demand": _WAYS[setup.demand],
        "push": _WAYS[setup.push],
        "touches": _ALL if setup.touches is None else setup.touches,
        "source_netns": texts.get("source_netns", ffi.NULL),
        "destination_netns": texts.get("destination_netns", ffi.NULL),
        "host": texts["host"],
    }
    argument, result = ffi.new("struct floor_setup *", fields), ffi.new("struct floor_result *")
    if lib.floor_run(argument, result):
        raise HostError(ffi.string(result.failure).decode(errors="replace"))
    return {
        "wall_seconds": result.wall_ns / 1e9,
        "source_cpu_seconds": result.source_cpu_ns / 1e9,
        "destination_cpu_seconds": result.destination_cpu_ns / 1e9,
        "pages_demand": result.pages_demand,
        "pages_push": result.pages_push,
        "bytes_wire": result.bytes_urgent + result.bytes_push,
        "pages_resident": result.pages_resident,
        "pages_touched": result.pages_touched,
        "pages_checked": result.pages_checked,
        "pages_mismatched": result.pages_mismatched,
        "latency": _fields_of(read_histogram(ffi, result.latency)),
        "stall_per_toucher": [_fields_of(read_histogram(ffi, result.stall[t])) for t in range(setup.touchers)],
    }


def _fields_of(histogram: Histogram) -> dict[str, Any]:
    buckets = {str(index): count for index, count in enumerate(histogram.buckets) if count}
    return {"buckets": buckets, "sum_ns": histogram.sum_ns, "max_ns": histogram.max_ns}


def _histogram_of(fields: dict[str, Any]) -> Histogram:
    buckets = [0] * BUCKETS
    for index, count in fields["buckets"].items():
        buckets[int(index)] = count
    return Histogram(tuple(buckets), fields["sum_ns"], fields["max_ns"])


def _main() -> None:
    status = 0
    try:
        answer = _measure(FloorSetup(**json.load(sys.stdin)))
        sys.stdout.write(json.dumps(answer))
    except HostError as error:
        sys.stderr.write(f"{error}\n")
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that wait in a fault for ever would keep an orderly exit waiting too.
    os._exit(status)


if __name__ == "__main__":
    _main()
