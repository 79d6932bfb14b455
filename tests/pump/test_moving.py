"""Placing by MOVE: pages of the staging buffer are given away, and whatever the kernel will not move is copied.

Each test holds back the last byte of a frame, does something to the pages that lie in the staging buffer, and lets the
frame be whole. `busy` counts the pages that were copied because they could not be moved.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest

from postcopy.errors import HostError
from postcopy.kernel import Feature, Userfaultfd, calls, memory_type
from postcopy.pages.regions import Layout, Region
from postcopy.pump._pump import lib
from postcopy.pump.destination import DestinationPump
from postcopy.pump.half import ROLES, Role
from postcopy.pump.regions import Placement
from postcopy.wire.frame import FrameType
from tests.child import run_in_child
from tests.kernel.test_moving import pin
from tests.lacking import lacking
from tests.pump.stage import Stage, until

PAGE = 4096
SET_MEMORY_MERGE = 67  # prctl's PR_SET_MEMORY_MERGE, Linux 6.4
MERGEABLE, DO_FORK = 12, 11  # madvise's MADV_MERGEABLE, MADV_DOFORK
LOCK_ON_FAULT = 1  # mlock2's MLOCK_ONFAULT
KSM = Path("/sys/kernel/mm/ksm")


@pytest.fixture(autouse=True)
def _kernel_has_move() -> None:
    with Userfaultfd.open(optional=Feature.MOVE) as uffd:
        if not uffd.features:
            lacking("this kernel has no UFFDIO_MOVE")


class Moving(Stage):
    """A stage of anonymous memory whose pages are moved."""

    def __init__(self, pages: int = 8) -> None:
        super().__init__("anonymous", pages, Placement.MOVE)

    def staging(self, page: int, role: Role = "push") -> int:
        """Return where page number `page` of a payload lies in the staging buffer."""
        return int(lib.staging_payload(self.pump._pump, ROLES[role])) + page * PAGE

    def hold(self, frame: bytes) -> bytes:
        """Push all of a frame but its last byte, see that it has arrived, and return that byte."""
        before = self.pump.snapshot().bytes_received_push
        self.push.sendall(frame[:-1])
        until(lambda: self.pump.snapshot().bytes_received_push == before + len(frame) - 1)
        return frame[-1:]

    @property
    def busy(self) -> int:
        return self.pump.snapshot().outcomes["busy"]

    def shows(self, page: int, *fills: int) -> None:
        """See that the guest's pages from `page` on hold these bytes."""
        until(lambda: self.pump.snapshot().pages_resident >= page + len(fills))
        for number, fill in enumerate(fills, page):
            assert bytes(self.memory(number)) == self.content(fill), number


def given_away() -> None:
    with Moving() as stage:
        last = stage.hold(stage.pages(0, 1, 2, 3, 4))
        assert calls.read_memory(stage.staging(1), 1) == b"\2"
        stage.push.sendall(last)
        stage.shows(0, 1, 2, 3, 4)
        # They are the very pages: where they were there are zeros now.
        assert calls.read_memory(stage.staging(0), 4 * PAGE) == bytes(4 * PAGE)
        assert stage.busy == 0
        assert stage.pump.snapshot().outcomes["placed"] == 1


def test_a_run_is_given_away_by_one_move() -> None:
    run_in_child(given_away)


def odd_pieces() -> None:
    with Moving(64) as stage:
        # Small frames before large ones shift whatever is read together with them, by less and more than a page.
        news = [stage.frame(FrameType.ZERO, page) for page in range(20)]
        stage.push.sendall(b"".join(news[:3]) + stage.pages(32, 1, 2) + news[3] + stage.pages(34, 3))
        stage.push.sendall(b"".join(news[4:]) + stage.pages(35, 4, 5, 6, 7) + stage.pages(20, *range(20, 32)))
        frame = stage.pages(39, *range(39, 64))
        for start in range(0, len(frame), 5003):
            stage.push.sendall(frame[start : start + 5003])
        stage.finished()
        stage.shows(20, *range(20, 32), 1, 2, 3, 4, 5, 6, 7, *range(39, 64))
        assert stage.touch(5).done() == bytes(PAGE)
        # Nothing was copied: every payload lay on a page boundary, or MOVE would have been refused.
        assert stage.busy == 0


def test_payloads_are_moved_however_they_arrive() -> None:
    run_in_child(odd_pieces)


def pinned() -> bool:
    with Moving() as stage:
        last = stage.hold(stage.pages(0, 1, 2, 3))
        ring = pin(stage.staging(1), PAGE)
        if ring is None:
            return False
        stage.push.sendall(last)
        stage.shows(0, 1, 2, 3)
        assert stage.busy == 1
        # The page stays where it is for as long as it is pinned, and its neighbours do not.
        assert calls.read_memory(stage.staging(0), 3 * PAGE) == bytes(PAGE) + b"\2" * PAGE + bytes(PAGE)
        stage.push.sendall(stage.pages(3, 4, 5, 6))
        stage.shows(0, 1, 2, 3, 4, 5, 6)
        assert stage.busy == 2
        os.close(ring)
    return True


def test_a_pinned_page_is_copied() -> None:
    if not run_in_child(pinned):
        lacking("this kernel has no io_uring to pin a page with")


def pinned_demand() -> bool:
    with Moving() as stage:
        guest = stage.touch(5)
        stage.request(5)
        # The buffer's pages are there from the first frame on only.
        calls.write_memory(stage.staging(0, "urgent"), b"x")
        ring = pin(stage.staging(0, "urgent"), PAGE)
        if ring is None:
            return False
        stage.urgent.sendall(stage.pages(5, 0xD5))
        assert guest.done() == b"\xd5" * PAGE
        assert stage.busy == 1
        os.close(ring)
    return True


def test_a_demand_page_is_copied_where_the_buffer_is_pinned() -> None:
    if not run_in_child(pinned_demand):
        lacking("this kernel has no io_uring to pin a page with")


def forked(shared: bool) -> None:
    with Moving() as stage:
        last = stage.hold(stage.pages(0, 1, 2))
        if shared:
            calls.advise(stage.staging(0), 2 * PAGE, DO_FORK)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(reader, 1)
            os._exit(0)
        try:
            stage.push.sendall(last)
            stage.shows(0, 1, 2)
            # The last byte came after the fork, so the page it belongs to is the parent's own again.
            assert stage.busy == (1 if shared else 0)
        finally:
            os.write(writer, b"!")
            os.waitpid(child, 0)
        stage.push.sendall(stage.pages(2, 3))
        stage.shows(2, 3)


def test_a_child_does_not_get_the_buffer_so_its_pages_are_moved_all_the_same() -> None:
    run_in_child(forked, False)


def test_a_page_that_a_child_shares_is_copied() -> None:
    run_in_child(forked, True)


def locked() -> None:
    with Moving() as stage:
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(stage.mapping.address)
        assert libc.mlock2(address, ctypes.c_size_t(stage.region.size), LOCK_ON_FAULT) == 0
        stage.push.sendall(stage.pages(0, 1, 2))
        stage.shows(0, 1, 2)
        assert stage.busy == 2


def test_into_locked_memory_pages_are_copied() -> None:
    run_in_child(locked)


def merge_all_memory() -> bool:
    return bool(ctypes.CDLL(None, use_errno=True).prctl(SET_MEMORY_MERGE, 1, 0, 0, 0) == 0)


def flags_at(address: int) -> list[str]:
    """Return the kernel's flags of the mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first:
            start, _, stop = first.partition("-")
            inside = int(start, 16) <= address < int(stop, 16)
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:#x}")


def never_merged() -> bool:
    if not merge_all_memory():
        return False
    with Moving() as stage:
        assert "mg" in flags_at(stage.mapping.address)
        for role in ROLES:
            assert "mg" not in flags_at(stage.staging(0, role))
    return True


def test_the_buffer_is_kept_from_being_merged_in_a_process_that_merges_everything() -> None:
    if not run_in_child(never_merged):
        lacking("this kernel has no KSM for whole processes")


def merged() -> None:
    with Moving() as stage:
        last = stage.hold(stage.pages(0, 7, 7, 7, 7))
        # All pages of the run, since MOVE refuses a run that is not one mapping; the last one is written to once more.
        calls.advise(stage.staging(0), 4 * PAGE, MERGEABLE)
        until(lambda: int(Path("/proc/self/ksm_merging_pages").read_text()) > 0, "the merging of equal pages")
        stage.push.sendall(last)
        stage.shows(0, 7, 7, 7, 7)
        assert stage.busy in {1, 2, 3}


def test_merged_pages_are_copied(set_kernel: Any) -> None:
    if not KSM.exists():
        lacking("this kernel has no KSM")
    set_kernel(KSM / "sleep_millisecs", "0")
    set_kernel(KSM / "pages_to_scan", "1000")
    set_kernel(KSM / "run", "1")
    run_in_child(merged)


@pytest.mark.parametrize("name", ["shmem", "tmpfs"])
def test_memory_with_a_file_cannot_be_placed_by_move(name: str) -> None:
    kind = memory_type(name)
    region = Region(0, name, PAGE, PAGE)
    ways = {"demand": [Placement.COPY], "push": [Placement.MOVE]}
    with kind.allocate(region, alias=False) as mapping, pytest.raises(HostError, match="Invalid argument"):
        DestinationPump(Layout((region,)), [mapping], -1, **ways, zeropage=[True], poll_max_ns=0)
