"""A page map that outlives its pump: what the next one makes of it, however the former one ended."""

from __future__ import annotations

import socket

import pytest

from postcopy.errors import HostError
from postcopy.kernel import Feature, Mode, Userfaultfd, calls
from postcopy.pages.regions import Layout, Region
from postcopy.pump._pump import ffi
from postcopy.pump.destination import DestinationPump
from postcopy.pump.regions import Placement, Removal
from postcopy.wire.frame import FrameType, Header, pack
from tests.child import run_in_child
from tests.pump.stage import Toucher, connection, until

ABSENT, REQUESTED, PLACING, PLACED, ZERO, WATCHED, DROPPED, POISONED = range(8)
PAGE = 4096
# In the order of the constants; the last page was never looked at.
LEFT = bytes([*range(8), ABSENT])
TAKEN_UP = bytes([ABSENT, ABSENT, ABSENT, PLACED, ZERO, ABSENT, ZERO, POISONED, ABSENT])


class Kept:
    """Memory with a userfaultfd, and a page map beside it that no pump owns."""

    def __init__(self, states: bytes) -> None:
        self.region = Region(0, "anonymous", PAGE, len(states) * PAGE)
        self.address = calls.map_anonymous(self.region.size)
        self.alias, self.fd, self.fd_offset = 0, -1, 0
        self.uffd = Userfaultfd.open(Feature.THREAD_ID | Feature.EVENT_REMOVE)
        self.uffd.register(self.address, self.region.size, Mode.MISSING)
        self.states = calls.map_anonymous(PAGE)
        calls.write_memory(self.states, states)

    def pump(self) -> DestinationPump:
        return DestinationPump(
            Layout((self.region,)), [self], self.uffd.fd, demand=[Placement.COPY], push=[Placement.COPY],
            zeropage=[True], poll_max_ns=0, removal=[Removal.DISCARDS], foreign=True, maps=[self.states],
        )  # fmt: skip

    def touch(self, page: int) -> Toucher:
        return Toucher(memoryview(ffi.buffer(ffi.cast("char *", self.address + page * PAGE), PAGE)).cast("B"))

    def known(self) -> bytes:
        return calls.read_memory(self.states, self.region.size // PAGE)


def what_is_left() -> tuple[bytes, int, int]:
    kept = Kept(LEFT)
    with kept.pump() as pump:
        stats = pump.snapshot()
    return kept.known(), stats.pages_resident, stats.pages_kept


def test_pages_that_were_on_their_way_are_asked_for_again_and_all_others_stay_what_they_were() -> None:
    assert run_in_child(what_is_left) == (TAKEN_UP, 3, 3)


def no_map() -> str:
    kept = Kept(bytes([200, ABSENT]))
    try:
        kept.pump()
    except HostError as refused:
        return str(refused)
    return ""


def in_place() -> str:
    kept = Kept(bytes(2))
    kept.alias = kept.address
    try:
        kept.pump()
    except HostError as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize("refused", [no_map, in_place])
def test_what_is_no_page_map_or_no_memory_to_keep_one_of_is_refused(refused) -> None:  # type: ignore[no-untyped-def]
    assert "Invalid argument" in run_in_child(refused)


def without_a_source_and_then_with_one() -> list[bytes]:
    """Faults are served with what is here, and asked for once there is somebody to ask."""
    kept = Kept(bytes([ZERO, ABSENT, REQUESTED]))
    kept.uffd.copy(kept.address + 2 * PAGE, b"g" * PAGE)  # it came, and the pump was killed before it said so
    with kept.pump() as pump:
        pump.part()
        pump.start()
        zeros = kept.touch(0).done()
        waiting = kept.touch(1)
        until(lambda: kept.known()[1] == REQUESTED, "the fault")
        (urgent, ours), (push, other) = connection(), connection()
        pump.detach()
        pump.attach("urgent", ours.detach())
        pump.attach("push", other.detach())
        pump.resume()
        assert urgent.recv(24, socket.MSG_WAITALL) == pack(Header(FrameType.REQUEST, 0, PAGE, PAGE))
        push.sendall(pack(Header(FrameType.PAGES, 0, PAGE, 2 * PAGE)) + b"x" * 2 * PAGE)
        found = waiting.done()
        until(lambda: pump.status().state == "complete", "the last page")
        assert kept.known() == bytes([PLACED] * 3)
        assert pump.snapshot().pages_kept == 1
        guest = calls.read_memory(kept.address + 2 * PAGE, PAGE)
        urgent.close()
        push.close()
    return [zeros, found, guest]


def test_a_pump_begins_without_a_source_and_goes_on_with_one() -> None:
    assert run_in_child(without_a_source_and_then_with_one) == [bytes(PAGE), b"x" * PAGE, b"g" * PAGE]
