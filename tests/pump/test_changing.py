"""Mappings that change while pages are to be placed: it is tried again, and a stop in between loses nothing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from postcopy.pump.regions import Placement
from postcopy.wire.frame import FrameType, Header, pack
from tests.child import run_in_child
from tests.pump.changing import changes, held, hold, leap, take
from tests.pump.stage import DEADLINE, Stage, until
from tests.pump.test_destination import ABSENT, PLACED, PLACING, REQUESTED, WATCHED, WAYS, ZERO

pytestmark = pytest.mark.usefixtures("changing_kernel")
BEAT = pack(Header(FrameType.BEAT, 0, 0, 0))


@pytest.fixture(autouse=True)
def _pool(request: pytest.FixtureRequest) -> None:
    if "hugetlb-" in request.node.name:
        request.getfixturevalue("huge_pages")("hugetlb-2M", 16)


def frames(stage: Stage, first: int, *fills: int) -> bytes:
    """Return pages as a source sends them: huge ones alone, others in a run."""
    if stage.page_size <= 4096:
        return stage.pages(first, *fills)
    return b"".join(stage.pages(first + i, fill) for i, fill in enumerate(fills))


def stopped_while_it_tries(type_name: str, placement: Placement) -> None:
    with Stage(type_name, 6, placement) as stage:
        waiting = stage.touch(1)
        stage.request(1)
        changes(-1)
        stage.urgent.sendall(stage.pages(1, 0x11))
        stage.push.sendall(stage.pages(3, *(0x13, 0x14)[: 65536 // stage.page_size or 1]))
        until(lambda: (stage.state(1), stage.state(3)) == (WATCHED, PLACING), "the claims")
        stage.pump.detach()
        assert [stage.state(page) for page in range(6)] == [ABSENT, REQUESTED] + [ABSENT] * 4
        changes(0)
        stage.resume()
        stage.request(1)
        stage.urgent.sendall(stage.pages(1, 0x21))
        stage.push.sendall(frames(stage, 2, 0x22, 0x23, 0x24, 0x25) + stage.frame(FrameType.ZERO, 0))
        assert waiting.done() == b"\x21" * 4096
        stage.finished()
        assert [stage.touch(page).done()[0] for page in range(6)] == [0, 0x21, 0x22, 0x23, 0x24, 0x25]
        stats = stage.pump.snapshot()
        assert (stats.pages_demand, stats.pages_push, stats.pages_zero, stats.pages_duplicate) == (1, 4, 1, 0)


@pytest.mark.parametrize(("type_name", "placement"), WAYS)
def test_claims_of_pages_that_could_not_be_placed_are_given_up(type_name: str, placement: Placement) -> None:
    run_in_child(stopped_while_it_tries, type_name, placement)


def stopped_in_a_run(type_name: str, placement: Placement) -> None:
    """Of what was placed before the stop nothing is given up, of what was not all is."""
    with Stage(type_name, 6, placement) as stage:
        whole = frames(stage, 0, 1, 2, 3)
        stage.push.sendall(whole[: -stage.page_size])
        if stage.page_size > 4096:
            until(lambda: [stage.state(page) for page in (0, 1)] == [PLACED] * 2)
        if placement is Placement.CONTINUE:
            until(lambda: stage.state(2) in {PLACING, WATCHED}, "the claim of the run's last page")
        changes(-1)
        guest = stage.touch(2)
        stage.push.sendall(whole[-stage.page_size :])
        until(lambda: stage.state(2) == WATCHED, "the last page")
        placed = [page for page in (0, 1) if stage.state(page) == PLACED]
        stage.pump.detach()
        assert [stage.state(page) for page in range(3)] == [PLACED if page in placed else ABSENT for page in (0, 1)] + [
            REQUESTED
        ]
        changes(0)
        stage.resume()
        stage.request(2)
        stage.push.sendall(frames(stage, 0, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16))
        assert guest.done()[:1] == b"\x13"
        stage.finished()
        wanted = [page + 1 if page in placed else 0x11 + page for page in range(6)]
        assert [stage.touch(page).done()[0] for page in range(6)] == wanted


@pytest.mark.parametrize(("type_name", "placement"), WAYS)
def test_what_was_placed_before_is_not_given_up(type_name: str, placement: Placement) -> None:
    run_in_child(stopped_in_a_run, type_name, placement)


def zeros_while_it_tries(type_name: str, placement: Placement) -> None:
    with Stage(type_name, 8, placement) as stage:
        asked = stage.touch(1)
        stage.request(1)
        stage.push.sendall(stage.frame(FrameType.ZERO, 2, 4))
        until(lambda: stage.state(5) == ZERO)
        changes(-1)
        # One for which a fault waits already, and four that are touched now: the first stands in the way of the others.
        stage.push.sendall(stage.frame(FrameType.ZERO, 1))
        guests = [stage.touch(page) for page in range(2, 6)]
        until(lambda: PLACING in [stage.state(page) for page in range(2, 6)], "the first fault's claim")
        until(lambda: stage.state(1) == WATCHED, "the claim for zeros")
        stage.pump.detach()
        assert stage.state(1) == REQUESTED
        until(lambda: PLACING in [stage.state(page) for page in range(2, 6)], "the fault is tried again")
        assert all(guest.waits for guest in guests)
        changes(0)
        assert [guest.done() for guest in guests] == [bytes(4096)] * 4
        until(lambda: stage.pump.snapshot().pending == 1, "the end of the four faults")
        stage.resume()
        stage.request(1)
        stage.push.sendall(stage.frame(FrameType.ZERO, 0, 2) + frames(stage, 6, 6, 7))
        assert asked.done() == bytes(4096)
        stage.finished()
        until(lambda: stage.pump.snapshot().pending == 0, "the end of every fault")
        stats = stage.pump.snapshot()
        assert (stats.pages_zero, stats.faults_missing) == (6, 5)


@pytest.mark.parametrize(("type_name", "placement"), WAYS)
def test_faults_that_were_read_and_not_served_are_served_after_a_stop(type_name: str, placement: Placement) -> None:
    run_in_child(zeros_while_it_tries, type_name, placement)


def beating() -> None:
    with Stage(pages=4, beat_ns=20_000_000) as stage:
        guest = stage.touch(1)
        header = b""
        while header != stage.frame(FrameType.REQUEST, 1):
            header = stage.urgent.recv(24)
        changes(-1)
        stage.urgent.sendall(stage.pages(1, 0x11))
        stage.push.sendall(stage.pages(2, 0x12))
        until(lambda: (stage.state(1), stage.state(2)) == (WATCHED, PLACING), "the claims")
        stage.pump.watch()
        for _ in range(6):  # more than it takes to find a connection silent
            assert (stage.urgent.recv(24), stage.push.recv(24)) == (BEAT, BEAT)
        assert stage.pump.status().error is None
        changes(0)
        assert guest.done() == b"\x11" * 4096
        until(lambda: stage.state(2) == PLACED)


def test_it_is_heard_of_while_it_tries_and_calls_nobody_silent() -> None:
    run_in_child(beating)


def without_end(end: str, seconds: int) -> str:
    with Stage(pages=4) as stage:
        guest = stage.touch(1)
        stage.request(1)
        changes(-1)
        (stage.urgent if end == "urgent" else stage.push).sendall(stage.pages(1, 0x11))
        until(lambda: stage.state(1) == WATCHED, "the claim")
        until(lambda: stage.pump.snapshot().outcomes["retry"] > 1, "the tries")
        leap(seconds)
        if seconds < 20:
            before = stage.pump.snapshot().outcomes["retry"]
            until(lambda: stage.pump.snapshot().outcomes["retry"] > before + 1, "more tries")
            changes(0)
            assert guest.done() == b"\x11" * 4096
        else:
            stage.finished()
            changes(0)
        return str(stage.pump.status().error)


@pytest.mark.parametrize("end", ["urgent", "push"])
def test_it_is_tried_for_twenty_seconds_and_no_longer(end: str) -> None:
    assert run_in_child(without_end, end, 15) == "None"
    assert "Resource temporarily unavailable" in run_in_child(without_end, end, 25)


def ended_by_two(other: str) -> tuple[bool, str]:
    """One thread of the owner takes the connections away, another ends the pump, and a page is being placed."""
    with Stage(pages=4) as stage:
        guest = stage.touch(1)
        stage.request(1)
        hold(True)
        stage.urgent.sendall(stage.pages(1, 0x11))
        until(lambda: held() == 1, "the placing")
        first = threading.Thread(target=stage.pump.detach, daemon=True)
        first.start()
        second = threading.Thread(target=getattr(stage.pump, other), daemon=True)
        second.start()
        second.join(0.3)  # which it does not, unless it is wrong
        early = not second.is_alive()
        hold(False)
        for one in (first, second):
            one.join(DEADLINE)
            assert not one.is_alive(), "it is still waiting"
        assert guest.done() == b"\x11" * 4096
        late = stage.touch(2)
        alone = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        assert late.waits
        return early, "".join(name for name in alone if name.startswith("pc-"))


@pytest.mark.parametrize("other", ["stop", "close"])
def test_two_threads_of_the_owner_end_a_pump_one_after_the_other(other: str) -> None:
    early, threads = run_in_child(ended_by_two, other)
    assert not early, "it said that the pump had stopped while a page was being placed"
    assert threads == ""


def poisoned_in_pieces() -> int:
    """Each piece is put off for a while, none of them for long."""
    with Stage(pages=8) as stage:
        for page in range(0, 8, 2):
            stage.push.sendall(stage.pages(page, page + 1))
        until(lambda: stage.pump.snapshot().pages_resident == 4)
        stage.pump.detach()
        take(15)
        with ThreadPoolExecutor(1) as thread:  # time passes for all but the first one
            return thread.submit(stage.pump.poison).result()


def test_pages_that_are_lost_are_poisoned_although_each_is_put_off() -> None:
    assert run_in_child(poisoned_in_pieces) == 4
