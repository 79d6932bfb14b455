"""The destination's pump against a source played by the test: every race in the order that is hardest on it."""

from __future__ import annotations

import socket
import struct

import pytest

from postcopy.pump.regions import Placement
from postcopy.wire.frame import FrameType, Header, pack
from tests.child import run_in_child
from tests.pump.stage import Stage, Toucher, until

ABSENT, REQUESTED, PLACING, PLACED, ZERO, WATCHED = range(6)

WAYS = [
    pytest.param("shmem", Placement.COPY, id="shmem-copy"),
    pytest.param("shmem", Placement.CONTINUE, id="shmem-continue"),
    pytest.param("anonymous", Placement.COPY, id="anonymous-copy"),
    pytest.param("anonymous", Placement.MOVE, id="anonymous-move"),
    pytest.param("hugetlb-2M", Placement.COPY, id="hugetlb-copy"),
    pytest.param("hugetlb-2M", Placement.CONTINUE, id="hugetlb-continue"),
]


@pytest.fixture(autouse=True)
def _pool(request: pytest.FixtureRequest) -> None:
    if "hugetlb-2M" in request.node.name or "hugetlb-" in request.node.name:
        request.getfixturevalue("huge_pages")("hugetlb-2M", 16)


def two_vcpus_on_one_page(type_name: str, placement: Placement) -> None:
    with Stage(type_name, placement=placement) as stage:
        first, second = stage.touch(3), stage.touch(3)
        until(lambda: stage.pump.snapshot().pending == 2, "the second fault")
        assert stage.pump.progress() == (0, 2)
        stage.request(3)
        stage.no_request()
        stage.urgent.sendall(stage.pages(3, 0xA5))
        assert first.done() == second.done() == b"\xa5" * 4096
        until(lambda: stage.pump.snapshot().fault_latency.count == 2)
        stats = stage.pump.snapshot()
        assert (stats.requests, stats.pages_demand, stats.pages_resident, stats.pending) == (1, 1, 1, 0)
        assert stage.pump.progress() == (1, 0)
        assert stats.faults_missing + stats.faults_minor == 2
        # One of them has fetched it, the first, and waited longest: its parts are the whole of that.
        parts = stats.request_seconds + stats.answer_seconds + stats.place_seconds
        assert (stats.faults_fetched, parts) == (1, pytest.approx(stats.fault_latency.max_ns / 1e9))
        assert min(stats.request_seconds, stats.answer_seconds, stats.place_seconds) > 0


@pytest.mark.parametrize(("type_name", "placement"), WAYS)
def test_two_vcpus_on_one_page_are_both_woken_by_one_answer(type_name: str, placement: Placement) -> None:
    run_in_child(two_vcpus_on_one_page, type_name, placement)


def fault_while_the_push_places(type_name: str) -> None:
    with Stage(type_name, placement=Placement.CONTINUE) as stage:
        frame = stage.pages(2, 0x11)
        stage.push.sendall(frame[:-1])
        until(lambda: stage.state(2) == PLACING, "the push's claim")
        guest = stage.touch(2)
        until(lambda: stage.state(2) == WATCHED, "the fault")
        assert guest.waits
        stage.no_request()
        stage.push.sendall(frame[-1:])
        assert guest.done() == b"\x11" * 4096
        until(lambda: stage.pump.snapshot().fault_latency.count == 1, "the record of the latency")
        stats = stage.pump.snapshot()
        assert (stats.requests, stats.pages_push, stats.pages_demand, stats.faults_fetched) == (0, 1, 0, 0)


@pytest.mark.parametrize("type_name", ["shmem", "hugetlb-2M"])
def test_a_fault_on_a_page_that_the_push_is_placing_waits_for_the_push(type_name: str) -> None:
    run_in_child(fault_while_the_push_places, type_name)


def push_overtakes_the_answer(type_name: str, placement: Placement) -> None:
    with Stage(type_name, placement=placement) as stage:
        guest = stage.touch(1, b"guest")
        stage.request(1)
        stage.push.sendall(stage.pages(1, 0x22))
        guest.done()
        stage.urgent.sendall(stage.pages(1, 0x22))
        until(lambda: stage.pump.snapshot().pages_duplicate == 1, "the late answer")
        assert bytes(stage.memory(1)[:6]) == b"guest\x22"
        until(lambda: stage.pump.snapshot().fault_latency.count == 1)
        assert (stage.pump.snapshot().pages_push, stage.pump.snapshot().faults_fetched) == (1, 0)


@pytest.mark.parametrize(("type_name", "placement"), WAYS)
def test_a_push_may_overtake_the_answer_which_is_then_dropped(type_name: str, placement: Placement) -> None:
    run_in_child(push_overtakes_the_answer, type_name, placement)


def late_push(type_name: str, placement: Placement) -> None:
    with Stage(type_name, pages=4, placement=placement) as stage:
        guest = stage.touch(1, b"guest")
        stage.request(1)
        stage.urgent.sendall(stage.pages(1, 0x33))
        guest.done()
        # Whole and in pieces, alone and in the middle of a run: the guest's bytes are the guest's.
        stage.push.sendall(stage.pages(1, 0x44))
        until(lambda: stage.pump.snapshot().pages_duplicate == 1, "the first duplicate")
        count = 3 if stage.page_size == 4096 else 1
        for page in range(0 if count == 3 else 1, 2, 3):
            frame = stage.pages(page, *range(0x50, 0x50 + count))
            for start in range(0, len(frame), len(frame) // 7):
                stage.push.sendall(frame[start : start + len(frame) // 7])
        until(lambda: stage.pump.snapshot().pages_duplicate == 2, "the second duplicate")
        if count == 3:
            until(lambda: stage.pump.snapshot().pages_resident == 3)
            assert bytes(stage.memory(0)) == stage.content(0x50)
            assert bytes(stage.memory(2)) == stage.content(0x52)
        assert bytes(stage.memory(1)) == b"guest" + stage.content(0x33)[5:]


@pytest.mark.parametrize(("type_name", "placement"), WAYS)
def test_a_push_for_a_page_the_guest_has_written_is_dropped(type_name: str, placement: Placement) -> None:
    run_in_child(late_push, type_name, placement)


def zero_pages(type_name: str, placement: Placement) -> None:
    with Stage(type_name, pages=8, placement=placement) as stage:
        waiting = stage.touch(0)
        stage.request(0)
        stage.push.sendall(stage.frame(FrameType.ZERO, 0, 8))
        assert waiting.done() == bytes(4096)
        stage.finished()
        assert [stage.state(page) for page in range(8)] == [PLACED] + [ZERO] * 7
        # Content that comes after the news is old: dropped. A touch needs nobody but this host.
        stage.push.sendall(stage.pages(5, 0x66))
        until(lambda: stage.pump.snapshot().pages_duplicate == 1)
        assert stage.touch(5).done() == bytes(4096)
        stage.touch(6, b"guest").done()
        assert bytes(stage.memory(6)[:6]) == b"guest\0"
        stats = stage.pump.snapshot()
        assert (stats.requests, stats.pages_zero, stats.pages_resident) == (1, 8, 8)
        assert stage.pump.status().state == "complete"
        until(lambda: stage.pump.snapshot().fault_latency.count == 3)


@pytest.mark.parametrize(("type_name", "placement"), WAYS)
def test_zero_pages_cost_an_extent_and_are_placed_when_touched(type_name: str, placement: Placement) -> None:
    run_in_child(zero_pages, type_name, placement)


def complete_by_both(type_name: str, placement: Placement) -> None:
    with Stage(type_name, pages=4, placement=placement) as stage:
        guest = stage.touch(3)
        stage.request(3)
        for page in range(3):
            stage.push.sendall(stage.pages(page, 0x70 + page))
        stage.push.sendall(pack(Header(FrameType.END, 0, 0, 0)))
        until(lambda: stage.pump.snapshot().push_ended)
        assert stage.pump.status().state == "running"
        stage.urgent.sendall(stage.pages(3, 0x73))
        assert guest.done() == b"\x73" * 4096
        stage.finished()
        stats = stage.pump.snapshot()
        assert (stats.pages_push, stats.pages_demand, stats.pages_zero, stats.pages_total) == (3, 1, 0, 4)
        assert stats.bytes_received_push == 4 * 24 + 3 * stage.page_size
        assert stats.bytes_received_urgent == 24 + stage.page_size
        # The connections may go now: nothing depends on the source any more.
        stage.urgent.close()
        stage.push.close()
        stage.pump.stop()
        assert stage.pump.status().state == "complete"


@pytest.mark.parametrize(("type_name", "placement"), WAYS)
def test_it_is_complete_when_push_and_demand_have_brought_everything(type_name: str, placement: Placement) -> None:
    run_in_child(complete_by_both, type_name, placement)


def many_requests() -> None:
    with Stage(pages=64) as stage:
        guests = [stage.touch(page) for page in range(64)]
        until(lambda: stage.pump.snapshot().pending == 64)
        wanted = b""
        while len(wanted) < 64 * 24:
            wanted += stage.urgent.recv(4096)
        asked = {struct.unpack_from("<HBBHHQQ", wanted, at)[5] // 4096 for at in range(0, len(wanted), 24)}
        assert asked == set(range(64))
        stage.urgent.sendall(b"".join(stage.pages(page, page) for page in reversed(range(64))))
        for page, guest in enumerate(guests):
            assert guest.done() == bytes([page]) * 4096
        stage.finished()


def test_many_threads_wait_at_once_and_each_gets_its_page() -> None:
    run_in_child(many_requests)


GOOD = {"type": FrameType.PAGES, "region": 0, "offset": 0, "length": 4096}
REFUSED = {
    "magic": ({"magic": 0x4547}, "refused (magic)"),
    "type": ({"type": 9}, "refused (type)"),
    "request": ({"type": FrameType.REQUEST}, "refused (type)"),
    "reserved": ({"flags": 1}, "refused (reserved)"),
    "region": ({"region": 7}, "refused (region)"),
    "alignment": ({"offset": 1}, "refused (alignment)"),
    "nothing": ({"length": 0}, "refused (alignment)"),
    "limit": ({"length": 4 << 20}, "refused (limit)"),
    "range": ({"offset": 8 * 4096}, "refused (range)"),
    "overflow": ({"offset": 2**64 - 4096, "length": 8192}, "refused (range)"),
}


def refused_frame(role: str, changes: dict[str, int], text: str) -> None:
    with Stage() as stage:
        end: socket.socket = getattr(stage, role)
        end.sendall(pack(Header(**{**GOOD, **changes})) + b"\xff" * 4096)
        stage.finished()
        status = stage.pump.status()
        assert status.state == "broken"
        assert status.error is not None
        assert text in status.error
        assert f"the {role} connection" in status.error
        assert bytes(stage.pump.page_map(0)) == bytes(8), "a refused frame touched a page"


@pytest.mark.parametrize("role", ["urgent", "push"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_frame_ends_it_with_the_reason(role: str, case: str) -> None:
    run_in_child(refused_frame, role, *REFUSED[case])


def ends(how: str) -> None:
    with Stage() as stage:
        if how == "truncated":
            stage.push.sendall(stage.pages(0, 1)[:2000])
            stage.push.close()
        elif how == "closed":
            stage.urgent.close()
        elif how == "reset":
            stage.urgent.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stage.urgent.close()
        elif how == "incomplete":
            stage.push.sendall(stage.pages(0, 1) + pack(Header(FrameType.END, 0, 0, 0)))
        stage.finished()
        expected = {
            "truncated": "the push connection was closed by the source",
            "closed": "the urgent connection was closed by the source",
            "reset": "the urgent connection to the source broke: Connection reset by peer (ECONNRESET)",
            "incomplete": "and a page never came: region 0, offset 0x1000, length 0x1000",
        }[how]
        status = stage.pump.status()
        assert status.state == "broken"
        assert expected in str(status.error)


@pytest.mark.parametrize("how", ["truncated", "closed", "reset", "incomplete"])
def test_an_early_end_is_told(how: str) -> None:
    run_in_child(ends, how)


def lost_while_waiting() -> None:
    stage = Stage()
    guest = stage.touch(0)
    stage.request(0)
    stage.urgent.close()
    stage.finished()
    assert stage.pump.status().state == "broken"
    stage.pump.close()
    assert guest.waits, "the guest was let go without its page"


def test_a_lost_connection_lets_no_one_go_on_without_the_page() -> None:
    run_in_child(lost_while_waiting)


def source_that_reads_nothing() -> None:
    """The push brings what is asked for, so faults end while their requests pile up unsent."""
    pages = 2048
    with Stage(pages=pages, connect=socket.socketpair) as stage:
        guests: list[Toucher] = []
        for first in range(0, pages, 64):
            guests = [stage.touch(page) for page in range(first, first + 64)]
            try:
                until(lambda: stage.pump.snapshot().pending == 64, seconds=0.5)
            except AssertionError:
                break  # it reads no faults any more: there is no room for their requests
            stage.push.sendall(stage.pages(first, *[7] * 64))
            for guest in guests:
                guest.done()
        else:
            raise AssertionError("the requests never filled what there is for them")
        assert stage.pump.status().state == "running"
        assert all(guest.waits for guest in guests)
        # Nothing is lost: once the source reads, the rest is asked for and served.
        read = 0
        while stage.pump.snapshot().pending < 64 or read < stage.pump.snapshot().requests * 24:
            read += len(stage.urgent.recv(1 << 20))
        assert read % 24 == 0
        stage.push.sendall(stage.pages(first, *[8] * 64))
        for guest in guests:
            assert guest.done() == b"\x08" * 4096


def test_a_source_that_reads_nothing_breaks_nothing() -> None:
    run_in_child(source_that_reads_nothing, deadline=90)


def served_alone(type_name: str, placement: Placement) -> None:
    with Stage(type_name, pages=8, placement=placement) as stage:
        stage.push.sendall(stage.frame(FrameType.ZERO, 0, 8))
        stage.finished()
        stage.urgent.close()
        stage.push.close()
        for page in range(8):
            assert stage.touch(page).done() == bytes(4096)
        until(lambda: stage.pump.snapshot().fault_latency.count == 8)
        assert stage.pump.status().state == "complete"


@pytest.mark.parametrize(("type_name", "placement"), WAYS)
def test_once_complete_it_serves_without_the_source(type_name: str, placement: Placement) -> None:
    run_in_child(served_alone, type_name, placement)
