"""The destination's pump without its connections: nothing half is kept, nothing is forgotten, the guest goes on."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from postcopy.pump.regions import Placement, Removal
from postcopy.wire.frame import FrameType, Header, pack
from tests.child import ChildFailedError, run_in_child
from tests.pump.stage import Stage, Toucher, until
from tests.pump.test_destination import ABSENT, PLACED, PLACING, REQUESTED, WATCHED, WAYS, ZERO

POISONED = 7
# As the kernel has it for each way in: EFAULT, or EHWPOISON, which Python does not name.
LOST = {errno.EFAULT, 133}
END = pack(Header(FrameType.END, 0, 0, 0))
BEAT = pack(Header(FrameType.BEAT, 0, 0, 0))


@pytest.fixture(autouse=True)
def _pool(request: pytest.FixtureRequest) -> None:
    if "hugetlb-" in request.node.name:
        request.getfixturevalue("huge_pages")("hugetlb-2M", 16)


def holes_only(stage: Stage, page: int) -> bool:
    """Whether the file behind the memory has nothing there, as far as it can tell."""
    if stage.mapping.fd < 0 or stage.page_size > 4096:
        return True
    try:
        return os.lseek(stage.mapping.fd, page * stage.page_size, os.SEEK_DATA) >= (page + 1) * stage.page_size
    except OSError as nothing:
        return nothing.errno == errno.ENXIO


def begin(stage: Stage, placement: Placement) -> list[Toucher]:
    """Page 0 is the guest's, page 1 zeros; 2, 3 and 4 are waited for, of 2 and 4 a part has come."""
    written = stage.touch(0, b"guest")
    stage.request(0)
    stage.urgent.sendall(stage.pages(0, 0x10))
    written.done()
    stage.push.sendall(stage.frame(FrameType.ZERO, 1))
    until(lambda: stage.state(1) == ZERO)
    first, second = stage.touch(2), stage.touch(3)
    assert stage.requested(2) == {2, 3}
    # Half an answer, half a pushed page that nobody waits for, and half of one that somebody comes to wait for.
    stage.urgent.sendall(stage.pages(2, 0x12)[:-1])
    stage.push.sendall(stage.pages(4, 0x14)[:-1])
    if placement is Placement.CONTINUE:
        until(lambda: (stage.state(2), stage.state(4)) == (WATCHED, PLACING), "the claims")
        third = stage.touch(4)
        until(lambda: stage.state(4) == WATCHED, "the fault")
    else:
        third = stage.touch(4)
        stage.request(4)
    return [first, second, third]


def cut_and_resume(type_name: str, placement: Placement) -> None:
    with Stage(type_name, placement=placement) as stage:
        first, second, third = begin(stage, placement)
        stage.urgent.close()
        stage.finished()
        stage.pump.detach()
        assert [stage.state(page) for page in range(6)] == [PLACED, ZERO, REQUESTED, REQUESTED, REQUESTED, ABSENT]
        assert holes_only(stage, 2)
        assert holes_only(stage, 4)
        # What is here is served; what is not is waited for.
        assert stage.touch(0).done()[:5] == b"guest"
        assert stage.touch(1).done() == bytes(4096)
        late = stage.touch(5)
        until(lambda: stage.state(5) == REQUESTED, "a fault without a connection")
        assert all(guest.waits for guest in (first, second, third, late))
        stage.resume()
        assert stage.requested(4) == {2, 3, 4, 5}
        stage.no_request()
        # A source that does not know what was placed sends it again: the guest's bytes are the guest's.
        stage.push.sendall(stage.pages(0, 0x20))
        for page in (2, 3, 4, 5):
            stage.urgent.sendall(stage.pages(page, 0x30 + page))
        for page, guest in ((2, first), (3, second), (4, third), (5, late)):
            assert guest.done() == bytes([0x30 + page]) * 4096
        for page in (6, 7):
            stage.push.sendall(stage.pages(page, 0x30 + page))
        stage.push.sendall(END)
        until(lambda: stage.pump.status().state == "complete", "the last page")
        assert bytes(stage.memory(0)[:6]) == b"guest\x10"
        assert stage.touch(1).done() == bytes(4096)
        assert bytes(stage.memory(7)) == stage.content(0x37)
        stats = stage.pump.snapshot()
        assert stats.pages_demand + stats.pages_push + stats.pages_zero == stats.pages_total == 8


@pytest.mark.parametrize(("type_name", "placement"), WAYS)
def test_a_cut_in_the_middle_of_pages_and_the_way_on(type_name: str, placement: Placement) -> None:
    run_in_child(cut_and_resume, type_name, placement)


def cut_at(position: int, placement: Placement) -> None:
    """One connection after the other, each cut behind `position` bytes of the same stream, then a whole one."""
    with Stage("shmem", 4, placement) as stage:
        stream = stage.pages(0, 1, 2) + stage.frame(FrameType.ZERO, 2) + stage.pages(3, 4) + END
        guests = [stage.touch(page) for page in range(4)]
        assert stage.requested(4) == {0, 1, 2, 3}
        for _ in range(2):
            stage.push.sendall(stream[:position])
            stage.push.close()
            stage.finished()
            stage.pump.detach()
            assert {PLACING, WATCHED} & {stage.state(page) for page in range(4)} == set()
            stage.resume()
            missing = {page for page in range(4) if stage.state(page) == REQUESTED}
            assert stage.requested(len(missing)) == missing
        stage.push.sendall(stream)
        assert [guest.done()[0] for guest in guests] == [1, 2, 0, 4]
        assert [bytes(stage.memory(page)) for page in range(4)] == [stage.content(fill) for fill in (1, 2, 0, 4)]
        stage.finished()


@pytest.mark.parametrize("placement", [Placement.COPY, Placement.CONTINUE])
def test_a_cut_at_any_place_of_a_stream(placement: Placement) -> None:
    whole = 24 * 4 + 3 * 4096
    for position in (0, 1, 23, 24, 25, 24 + 4096, 24 + 8191, 24 + 8192, 8192 + 30, 8192 + 48, 8192 + 100, whole - 25):
        run_in_child(cut_at, position, placement)


def dropped_while_cut() -> None:
    with Stage("shmem", 4, Placement.CONTINUE) as stage:
        stage.push.sendall(stage.pages(1, 0x71)[:-1])
        until(lambda: stage.state(1) == PLACING, "the push's claim")
        stage.push.close()
        stage.finished()
        stage.pump.detach()
        # Given back while nothing is connected; what had come of it must not come to light as its zeros.
        stage.pump.discard(0, stage.page_size, stage.page_size)
        assert stage.touch(1).done() == bytes(4096)
        stage.resume()
        stage.push.sendall(stage.pages(1, 0x72))
        until(lambda: stage.pump.snapshot().pages_duplicate == 1, "the late copy")
        assert bytes(stage.memory(1)) == bytes(4096)


def test_what_came_in_part_is_not_taken_for_zeros() -> None:
    run_in_child(dropped_while_cut)


def private_pages_given_back_while_cut() -> None:
    with Stage("anonymous", 4, removal=Removal.DISCARDS) as stage:
        waiting = stage.touch(2)
        stage.request(2)
        stage.urgent.close()
        stage.finished()
        stage.pump.detach()
        stage.mapping.punch_hole(0, 4 * stage.page_size)
        assert waiting.done() == bytes(4096)
        until(lambda: stage.pump.status().state == "complete", "four pages of zeros")


def test_the_guest_may_give_back_everything_while_there_is_no_connection() -> None:
    run_in_child(private_pages_given_back_while_cut)


def incomplete() -> None:
    with Stage(pages=4) as stage:
        stage.push.sendall(stage.pages(0, 1, 2) + END)
        stage.finished()
        assert "a page never came" in str(stage.pump.status().error)
        stage.pump.detach()
        assert stage.pump.status().state == "running"
        stage.resume()
        stage.push.sendall(stage.pages(2, 3, 4) + END)
        until(lambda: stage.pump.status().state == "complete", "the rest")


def test_a_push_that_left_something_out_is_mended_by_another() -> None:
    run_in_child(incomplete)


def silence() -> None:
    with Stage(pages=4, beat_ns=20_000_000) as stage:
        for end in (stage.urgent, stage.push):
            assert end.recv(24) == BEAT
            assert end.recv(24) == BEAT
        assert stage.pump.status().state == "running"  # it may be that the source has not begun
        stage.pump.watch()
        stage.finished()
        assert "nothing was heard from the source on the" in str(stage.pump.status().error)
        stage.pump.detach()
        stage.resume()
        assert stage.urgent.recv(24) == BEAT


def test_a_silent_connection_is_broken_once_silence_counts() -> None:
    run_in_child(silence)


def heartbeats() -> None:
    with Stage(pages=2, beat_ns=200_000_000) as stage:
        stage.push.sendall(stage.pages(0, 1) + stage.frame(FrameType.ZERO, 1) + END)
        until(lambda: stage.pump.status().state == "complete")
    with Stage(pages=2, beat_ns=200_000_000) as stage:
        stage.pump.watch()
        for _ in range(6):
            for end in (stage.urgent, stage.push):
                assert end.recv(24) == BEAT
                end.sendall(BEAT)
        until(lambda: stage.pump.snapshot().beats == 12)
        assert stage.pump.status().state == "running"
        guest = stage.touch(0)
        stage.request(0)
        stage.urgent.sendall(stage.pages(0, 9))
        assert guest.done() == b"\x09" * 4096
        # Behind the end of the push nothing but beats is in order.
        stage.push.sendall(stage.frame(FrameType.ZERO, 1) + END + BEAT)
        until(lambda: stage.pump.snapshot().beats >= 13)
        assert stage.pump.status().state == "complete"


def test_heartbeats_keep_connections_alive() -> None:
    run_in_child(heartbeats)


def poison(type_name: str, placement: Placement) -> None:
    with Stage(type_name, placement=placement) as stage:
        stage.push.sendall(stage.pages(0, 0x55) + stage.frame(FrameType.ZERO, 1))
        until(lambda: stage.pump.snapshot().pages_resident == 2)
        waiting = stage.touch(2)
        stage.request(2)
        stage.push.sendall(stage.pages(3, 0x57)[:-1])
        stage.urgent.close()
        stage.finished()
        stage.pump.detach()
        assert stage.pump.poison() == 6
        assert waiting.failed() in LOST
        assert [stage.state(page) for page in range(8)] == [PLACED, ZERO] + [POISONED] * 6
        for page in range(2, 8):
            assert stage.touch(page).failed() in LOST
            assert stage.touch(page, b"x").failed() in LOST
        assert stage.touch(0).done() == b"\x55" * 4096
        assert stage.touch(1).done() == bytes(4096)
        stage.touch(1, b"guest").done()
        until(lambda: stage.pump.snapshot().pending == 0)
        assert stage.pump.snapshot().pages_poisoned == 6
        assert stage.pump.status().state == "running"


@pytest.mark.parametrize(("type_name", "placement"), WAYS)
def test_what_is_lost_is_refused_and_never_zeros(type_name: str, placement: Placement) -> None:
    run_in_child(poison, type_name, placement)


def touch_poison(page: int) -> int:
    with Stage(pages=4) as stage:
        stage.push.sendall(stage.pages(0, 0x55))
        until(lambda: stage.pump.snapshot().pages_resident == 1)
        stage.pump.detach()
        stage.pump.poison()
        return ctypes.c_ubyte.from_address(stage.mapping.address + page * stage.page_size).value


def test_who_touches_a_lost_page_gets_sigbus_at_exactly_that_page() -> None:
    assert run_in_child(touch_poison, 0) == 0x55
    with pytest.raises(ChildFailedError, match="exit code -7"):
        run_in_child(touch_poison, 2)


def given_back_after_poison() -> None:
    with Stage("anonymous", 4, removal=Removal.DISCARDS) as stage:
        stage.pump.detach()
        assert stage.pump.poison() == 4
        stage.mapping.punch_hole(0, stage.page_size)
        assert stage.touch(0).failed() in LOST
        assert stage.touch(0).failed() in LOST


def test_a_lost_page_that_is_given_back_stays_lost() -> None:
    run_in_child(given_back_after_poison)
