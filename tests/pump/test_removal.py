"""Pages that the guest gives back while they are on the way: zeros afterwards, not fetched, no late copy over them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from postcopy.errors import LinkError, UsageError
from postcopy.kernel import calls
from postcopy.pump.regions import Placement, Removal
from postcopy.wire.frame import FrameType, Header, pack
from tests.child import run_in_child
from tests.pump.stage import DEADLINE, Stage, until

ABSENT, REQUESTED, PLACING, PLACED, ZERO, WATCHED, DROPPED = range(7)
END = pack(Header(FrameType.END, 0, 0, 0))

# Memory, how its pages are placed, and how the guest gives them back.
WAYS = [
    pytest.param("anonymous", Placement.COPY, "MADV_DONTNEED", id="anonymous-copy"),
    pytest.param("anonymous", Placement.MOVE, "MADV_DONTNEED", id="anonymous-move"),
    pytest.param("shmem", Placement.COPY, "MADV_REMOVE", id="shmem-copy"),
    pytest.param("shmem", Placement.CONTINUE, "MADV_REMOVE", id="shmem-continue"),
    pytest.param("hugetlb-2M", Placement.CONTINUE, "MADV_REMOVE", id="hugetlb-continue"),
]


@pytest.fixture(autouse=True)
def _pool(request: pytest.FixtureRequest) -> None:
    if "hugetlb" in request.node.name:
        request.getfixturevalue("huge_pages")("hugetlb-2M", 16)


def give_back(stage: Stage, page: int, count: int, advice: str) -> None:
    """Do what a guest's balloon does; returns once the kernel has taken the pages."""
    size = stage.page_size
    calls.advise(stage.mapping.address + page * size, count * size, getattr(calls, advice))


class Call(threading.Thread):
    """A call that may have to wait, in a thread."""

    def __init__(self, function: Callable[..., None], *arguments: object) -> None:
        super().__init__(daemon=True)
        self._work = lambda: function(*arguments)
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error

    def done(self) -> None:
        self.join(DEADLINE)
        assert not self.is_alive(), "the call is still waiting"
        if self.error is not None:
            raise self.error


def adds_up(stage: Stage, demand: int, push: int, zero: int) -> None:
    stats = stage.pump.snapshot()
    assert (stats.pages_demand, stats.pages_push, stats.pages_zero) == (demand, push, zero)
    assert demand + push + zero == stats.pages_resident == stats.pages_total


def absent_pages(type_name: str, placement: Placement, advice: str) -> None:
    with Stage(type_name, 8, placement, removal=Removal.DISCARDS) as stage:
        give_back(stage, 2, 3, advice)
        # The kernel lets the call return as soon as its event is read; what comes of it is known a moment later.
        until(lambda: [stage.state(page) for page in range(8)] == [ABSENT] * 2 + [ZERO] * 3 + [ABSENT] * 3)
        assert stage.touch(3).done() == bytes(4096)
        stage.no_request()
        for page in range(8):
            stage.push.sendall(stage.pages(page, 0x10 + page))
        stage.push.sendall(END)
        stage.finished()
        assert stage.pump.status().error is None
        for page in range(8):
            wanted = bytes(4096) if 2 <= page < 5 else bytes([0x10 + page]) * 4096
            assert stage.touch(page).done() == wanted
        adds_up(stage, 0, 5, 3)
        assert (stage.pump.snapshot().pages_removed, stage.pump.snapshot().pages_duplicate) == (3, 3)


@pytest.mark.parametrize(("type_name", "placement", "advice"), WAYS)
def test_what_was_not_there_yet_is_zeros_and_never_fetched(type_name: str, placement: Placement, advice: str) -> None:
    run_in_child(absent_pages, type_name, placement, advice)


def half_a_page() -> None:
    with Stage("hugetlb-2M", 3, Placement.CONTINUE, removal=Removal.DISCARDS) as stage:
        half = stage.page_size // 2
        calls.advise(stage.mapping.address + half, stage.page_size + stage.page_size, calls.MADV_REMOVE)
        until(lambda: [stage.state(page) for page in range(3)] == [ABSENT, ZERO, ABSENT])
        for page in range(3):
            stage.push.sendall(stage.pages(page, page + 1))
        stage.push.sendall(END)
        stage.finished()
        assert [stage.touch(page).done()[0] for page in range(3)] == [1, 0, 3]
        assert [stage.memory(page)[-1] for page in range(3)] == [1, 0, 3]


def test_a_page_of_which_only_a_part_was_given_back_keeps_the_rest(huge_pages: Callable[[str, int], None]) -> None:
    huge_pages("hugetlb-2M", 16)
    run_in_child(half_a_page)


def awaited_page(type_name: str, placement: Placement, advice: str) -> None:
    with Stage(type_name, 2, placement, removal=Removal.DISCARDS) as stage:
        guest = stage.touch(1)
        stage.request(1)
        give_back(stage, 1, 1, advice)
        assert guest.done() == bytes(4096)
        stage.urgent.sendall(stage.pages(1, 0x21))
        until(lambda: stage.pump.snapshot().pages_duplicate == 1, "the late answer")
        assert stage.touch(1).done() == bytes(4096)
        stage.push.sendall(stage.pages(0, 0x20) + END)
        stage.finished()
        adds_up(stage, 0, 1, 1)
        until(lambda: stage.pump.snapshot().pending == 0, "the end of every fault")


@pytest.mark.parametrize(("type_name", "placement", "advice"), WAYS)
def test_who_waits_for_a_page_that_is_given_back_gets_zeros(type_name: str, placement: Placement, advice: str) -> None:
    run_in_child(awaited_page, type_name, placement, advice)


def placed_page(type_name: str, placement: Placement, advice: str) -> None:
    with Stage(type_name, 2, placement, removal=Removal.DISCARDS) as stage:
        stage.push.sendall(stage.pages(0, 0x30) + stage.pages(1, 0x31))
        stage.finished()
        assert stage.touch(1, b"guest").done() == b""
        give_back(stage, 1, 1, advice)
        stage.push.sendall(stage.pages(1, 0x31))
        until(lambda: stage.pump.snapshot().pages_duplicate == 1, "the late copy")
        assert stage.touch(1).done() == bytes(4096)
        assert stage.touch(0).done() == b"\x30" * 4096
        adds_up(stage, 0, 2, 0)


@pytest.mark.parametrize(("type_name", "placement", "advice"), WAYS)
def test_what_was_there_is_zeros_afterwards(type_name: str, placement: Placement, advice: str) -> None:
    run_in_child(placed_page, type_name, placement, advice)


def while_it_is_received(type_name: str) -> None:
    with Stage(type_name, 2, Placement.CONTINUE, removal=Removal.DISCARDS) as stage:
        frame = stage.pages(1, 0x41)
        stage.push.sendall(frame[:-1])
        until(lambda: stage.state(1) == PLACING, "the push's claim")
        guest = stage.touch(1)
        until(lambda: stage.state(1) == WATCHED, "the fault")
        give_back(stage, 1, 1, "MADV_REMOVE")
        until(lambda: stage.state(1) == DROPPED)
        assert guest.waits
        stage.push.sendall(frame[-1:])
        assert guest.done() == bytes(4096)
        stage.push.sendall(stage.pages(0, 0x40) + END)
        stage.finished()
        adds_up(stage, 0, 1, 1)


@pytest.mark.parametrize("type_name", ["shmem", "hugetlb-2M"])
def test_a_page_that_is_given_back_while_its_bytes_come_in(type_name: str) -> None:
    run_in_child(while_it_is_received, type_name)


def only_unmapped(type_name: str) -> None:
    with Stage(type_name, 3, Placement.CONTINUE, removal=Removal.KEEPS) as stage:
        stage.push.sendall(stage.pages(0, 0x50))
        until(lambda: stage.state(0) == PLACED)
        give_back(stage, 0, 2, "MADV_DONTNEED")
        assert stage.touch(0).done() == b"\x50" * 4096, "the file keeps it"
        guest = stage.touch(1)
        stage.request(1)
        stage.urgent.sendall(stage.pages(1, 0x51))
        assert guest.done() == b"\x51" * 4096, "what is still at the source is fetched"
        give_back(stage, 0, 1, "MADV_REMOVE")
        assert stage.touch(0).done() == bytes(4096), "the file has lost it"
        stage.push.sendall(stage.pages(2, 0x52) + END)
        stage.finished()
        adds_up(stage, 1, 2, 0)


@pytest.mark.parametrize("type_name", ["shmem", "hugetlb-2M"])
def test_memory_whose_file_keeps_the_content_loses_nothing(type_name: str) -> None:
    run_in_child(only_unmapped, type_name)


# --- the toolkit's own call, for what raises no event ---------------------------------------------------------------


def punched_hole(type_name: str, placement: Placement) -> None:
    with Stage(type_name, 8, placement) as stage:
        stage.push.sendall(stage.pages(0, 0x60))
        until(lambda: stage.state(0) == PLACED)
        guest = stage.touch(1)
        stage.request(1)
        stage.pump.discard(0, 0, 4 * stage.page_size)
        assert guest.done() == bytes(4096)
        stage.mapping.punch_hole(0, 4 * stage.page_size)
        for page in range(8):
            stage.push.sendall(stage.pages(page, 0x60 + page))
        stage.push.sendall(END)
        stage.urgent.sendall(stage.pages(1, 0x61))
        stage.finished()
        until(lambda: stage.pump.snapshot().pages_duplicate == 5, "the late copies")
        for page in range(8):
            wanted = bytes(4096) if page < 4 else bytes([0x60 + page]) * 4096
            assert stage.touch(page).done() == wanted
        adds_up(stage, 0, 5, 3)


@pytest.mark.parametrize(
    ("type_name", "placement"),
    [("shmem", Placement.COPY), ("shmem", Placement.CONTINUE), ("hugetlb-2M", Placement.CONTINUE)],
)
def test_a_hole_punched_through_the_toolkit(type_name: str, placement: Placement) -> None:
    run_in_child(punched_hole, type_name, placement)


def discard_waits() -> None:
    with Stage("shmem", 4, Placement.CONTINUE) as stage:
        frame = stage.pages(1, 0x71)
        stage.push.sendall(frame[:-1])
        until(lambda: stage.state(1) == PLACING, "the push's claim")
        call = Call(stage.pump.discard, 0, 0, 2 * stage.page_size)
        until(lambda: stage.state(1) == DROPPED, "the mark")
        assert call.is_alive(), "a copy may still come: it must not return"
        stage.push.sendall(frame[-1:])
        call.done()
        stage.mapping.punch_hole(0, 2 * stage.page_size)
        assert stage.touch(1).done() == bytes(4096)
        assert stage.pump.snapshot().pages_removed == 2


def test_the_call_waits_for_a_page_that_is_being_placed() -> None:
    run_in_child(discard_waits)


def discard_ends() -> None:
    with Stage("shmem", 4, Placement.CONTINUE) as stage:
        stage.push.sendall(stage.pages(1, 0x71)[:-1])
        until(lambda: stage.state(1) == PLACING, "the push's claim")
        call = Call(stage.pump.discard, 0, stage.page_size, stage.page_size)
        until(lambda: stage.state(1) == DROPPED, "the mark")
        stage.pump.stop()
        with pytest.raises(LinkError, match="the pump ended"):
            call.done()
        for offset, length in ((1, 4096), (0, 4097), (16384, 4096), (2**63, 4096), (4096, 2**64 - 4096)):
            with pytest.raises(UsageError, match="no whole pages"):
                stage.pump.discard(0, offset, length)


def test_the_call_ends_where_the_page_can_not_come_any_more() -> None:
    run_in_child(discard_ends)


def discard_outlives_a_connection() -> None:
    with Stage("shmem", 4, Placement.CONTINUE) as stage:
        stage.push.sendall(stage.pages(1, 0x71)[:-1])
        until(lambda: stage.state(1) == PLACING, "the push's claim")
        call = Call(stage.pump.discard, 0, stage.page_size, stage.page_size)
        until(lambda: stage.state(1) == DROPPED, "the mark")
        stage.push.close()
        stage.finished()
        assert call.is_alive(), "the page is claimed, and what came of it is there"
        stage.pump.detach()
        call.done()
        assert stage.state(1) == ZERO
        assert stage.touch(1).done() == bytes(4096)


def test_the_call_ends_when_what_came_in_part_is_forgotten() -> None:
    run_in_child(discard_outlives_a_connection)


# --- everything at once ---------------------------------------------------------------------------------------------


def race(type_name: str, placement: Placement, advice: str, pages: int) -> None:
    """Push each page while the guest gives it back: once both are through it is zeros, whoever was first."""
    with Stage(type_name, pages, placement, removal=Removal.DISCARDS) as stage:

        def push() -> None:
            for page in range(0, pages, 8):
                stage.push.sendall(stage.pages(page, *[0xFF] * 8))

        pushing = Call(push)
        for page in range(pages):
            give_back(stage, page, 1, advice)
            if page % 3 == 0:  # at once, with the push anywhere: what was given back never shows its content
                assert stage.touch(page).done() == bytes(4096), f"page {page}"
        pushing.done()
        stage.finished()
        until(lambda: stage.pump.snapshot().bytes_received_push == pages // 8 * 24 + pages * 4096)
        until(lambda: stage.pump.snapshot().pages_push + stage.pump.snapshot().pages_duplicate == pages)
        for page in range(pages):
            assert stage.touch(page).done() == bytes(4096), f"page {page}"
        stats = stage.pump.snapshot()
        assert stage.pump.status().state == "complete"
        assert stats.pages_push + stats.pages_zero == stats.pages_resident == pages


@pytest.mark.parametrize(("type_name", "placement", "advice"), WAYS[:4])
def test_the_push_and_the_guest_race_for_every_page(type_name: str, placement: Placement, advice: str) -> None:
    run_in_child(race, type_name, placement, advice, 512)


def storm(placement: Placement) -> None:
    """Events without end, which stop all placing until they are read, while pages are asked for and pushed."""
    with Stage("anonymous", 257, placement, removal=Removal.DISCARDS) as stage:
        ends = threading.Event()

        def balloon() -> None:
            while not ends.is_set():
                give_back(stage, 256, 1, "MADV_DONTNEED")

        balloons = [Call(balloon) for _ in range(2)]
        for page in range(0, 256, 4):
            guest = stage.touch(page)
            stage.request(page)
            stage.push.sendall(stage.pages(page + 1, page, page, page))
            stage.urgent.sendall(stage.pages(page, page))
            assert guest.done() == bytes([page]) * 4096
        stage.finished()
        ends.set()
        for one in balloons:
            one.done()
        for page in range(256):
            assert stage.touch(page).done() == bytes([page - page % 4]) * 4096
        adds_up(stage, 64, 192, 1)


@pytest.mark.parametrize("placement", [Placement.COPY, Placement.MOVE])
def test_events_without_end_hold_nobody_up(placement: Placement) -> None:
    run_in_child(storm, placement)


def a_page_of_zeros_for_which_there_is_no_room(folder: Path) -> str | None:
    with Stage("tmpfs", placement=Placement.CONTINUE, place=folder, zeropage=False) as stage:
        stage.push.sendall(stage.frame(FrameType.ZERO, 0, 8))
        until(lambda: stage.state(7) == ZERO, "the hole")
        assert stage.touch(0).done() == bytes(4096)
        with (folder / "all").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        stage.touch(1)
        until(lambda: stage.pump.status().state == "failed", "the failure")
        return stage.pump.status().error


def test_a_file_that_can_have_no_more_pages_ends_the_pump_and_not_the_process(mount: Callable[..., Path]) -> None:
    error = run_in_child(a_page_of_zeros_for_which_there_is_no_room, mount("tmpfs", "size=64K"))
    assert error == (
        "giving the memory's file a page failed with No space left on device (ENOSPC) at region 0, offset 0x1000, "
        "length 0x1000"
    )
