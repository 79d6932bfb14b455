"""The trace of faults: what is recorded of each, in which order, and what a full ring forgets."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest

from postcopy.pump.trace import RECORD_BYTES, FaultTrace
from tests.child import run_in_child
from tests.pump.stage import Stage, until

PAGES = 8


class TracedStage(Stage):
    """A stage whose pump records into `trace`."""

    def __init__(self, trace: FaultTrace) -> None:
        self.recording = trace
        super().__init__(pages=PAGES)

    def before_start(self) -> None:
        self.pump.trace(self.recording)


def records(trace: FaultTrace) -> list[dict[str, int]]:
    return [
        {"at_us": at, "latency_ns": latency, "page": where & (1 << 34) - 1, "region": where >> 34 & 63,
         "found": where >> 40 & 3, "thread": where >> 42}
        for at, latency, where in struct.iter_unpack("<IIQ", trace.faults())
    ]  # fmt: skip


def three_faults(file: str) -> None:
    trace = FaultTrace(16)
    with TracedStage(trace) as stage:
        began = time.monotonic()
        first = stage.touch(3)
        stage.request(3)
        second = stage.touch(3)  # of a page that is on its way
        until(lambda: stage.pump.snapshot().pending == 2, "the second fault")
        stage.urgent.sendall(stage.pages(3, 0xA5))
        first.done()
        second.done()
        third = stage.touch(5)
        stage.request(5)
        stage.urgent.sendall(stage.pages(5, 0x5A))
        third.done()
        until(lambda: stage.pump.snapshot().fault_latency.count == 3)
        lasted = time.monotonic() - began
        assert trace.recorded == 3
        with pytest.raises(ValueError, match="before the pump"):
            stage.pump.trace(trace)
        stage.pump.stop()
        found = records(trace)
        assert trace.write(Path(file), stage.layout) == 3
        total = stage.pump.snapshot().fault_latency.sum_ns
    assert sorted((one["page"], one["found"]) for one in found) == [(3, 0), (3, 1), (5, 0)]
    assert found[2]["page"] == 5
    assert {one["region"] for one in found} == {0}
    assert all(one["thread"] > 0 for one in found)
    assert len({one["thread"] for one in found}) == 3
    assert sum(one["latency_ns"] for one in found) == total
    times = [one["at_us"] for one in found]
    assert times[2] >= max(times[:2])
    assert 0 < max(times) - min(times) < lasted * 1e6


def test_a_fault_is_recorded_with_its_page_thread_and_latency(tmp_path: Path) -> None:
    file, before_ns = tmp_path / "trace", time.monotonic_ns()
    run_in_child(three_faults, str(file))
    line, _, rest = file.read_bytes().partition(b"\n")
    head = json.loads(line)
    assert (head["faults"], head["lost"], len(rest)) == (3, 0, 3 * RECORD_BYTES)
    assert before_ns < head["began_ns"] < time.monotonic_ns()
    assert head["regions"] == [{"type": "shmem", "page_size": 4096, "size_bytes": PAGES * 4096}]


def more_faults_than_room(file: str) -> None:
    trace = FaultTrace(4)
    with TracedStage(trace) as stage:
        for page in range(6):
            toucher = stage.touch(page)
            stage.request(page)
            stage.urgent.sendall(stage.pages(page, page + 1))
            toucher.done()
            until(lambda page=page: stage.pump.snapshot().fault_latency.count == page + 1)
        stage.pump.stop()
        assert [one["page"] for one in records(trace)] == [2, 3, 4, 5]
        assert trace.write(Path(file), stage.layout) == 4


def test_a_full_ring_forgets_the_oldest(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    run_in_child(more_faults_than_room, str(file))
    head = json.loads(file.read_bytes().partition(b"\n")[0])
    assert (head["faults"], head["lost"]) == (4, 2)


def test_a_trace_begins_anew() -> None:
    trace = FaultTrace(2)
    assert (trace.recorded, trace.faults()) == (0, b"")
    with pytest.raises(ValueError, match="power of two"):
        FaultTrace(3)
