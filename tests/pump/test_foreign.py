"""Memory that is another process's: it may take mappings away, fork, and have filled pages before.

What the pump does about it does not depend on whose addresses they are, so here they are this process's own. The other
process comes in tests/outside.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from postcopy.errors import HostError
from postcopy.kernel import Feature, calls
from postcopy.pump.regions import Placement, Removal
from postcopy.wire.frame import FrameType, Header, pack
from tests.child import run_in_child
from tests.pump.stage import Stage, until

ABSENT, REQUESTED, PLACING, PLACED, ZERO = range(5)
END = pack(Header(FrameType.END, 0, 0, 0))


def foreign(features: Feature) -> Stage:
    return Stage("anonymous", 8, removal=Removal.DISCARDS, foreign=True, features=features)


def unmapping(told: bool) -> None:
    with foreign(Feature.EVENT_UNMAP if told else Feature(0)) as stage:
        calls.unmap(stage.mapping.address + 2 * stage.page_size, 2 * stage.page_size)
        if told:
            until(lambda: [stage.state(page) for page in range(8)] == [ABSENT] * 2 + [ZERO] * 2 + [ABSENT] * 4)
        stage.push.sendall(stage.pages(0, *range(1, 9)) + END)
        stage.finished()
        assert stage.pump.status().error is None
        for page in (0, 1, 4, 7):
            assert bytes(stage.memory(page)) == stage.content(page + 1)
        assert stage.pump.snapshot().outcomes["gone"] == (0 if told else 2)


@pytest.mark.parametrize("told", [True, False])
def test_pages_that_were_unmapped_are_no_failure(told: bool) -> None:
    run_in_child(unmapping, told)


def filled_before() -> None:
    with foreign(Feature(0)) as stage:
        stage.uffd.copy(stage.mapping.address + 3 * stage.page_size, b"mine" + bytes(stage.page_size - 4))
        stage.push.sendall(stage.pages(0, *range(1, 9)) + END)
        stage.finished()
        assert stage.pump.status().error is None
        assert bytes(stage.memory(3)[:4]) == b"mine"
        assert bytes(stage.memory(4)) == stage.content(5)


def test_pages_that_were_there_before_stay_as_they_are() -> None:
    run_in_child(filled_before)


def forking() -> list[int]:
    with foreign(Feature.EVENT_FORK) as stage:
        stage.push.sendall(stage.pages(0, 1))
        until(lambda: stage.state(0) == PLACED)
        ends = []
        for page in (0, 1):
            child = os.fork()
            if not child:
                signal.signal(signal.SIGBUS, signal.SIG_DFL)
                os._exit(stage.memory(page)[0])
            ends.append(os.waitpid(child, 0)[1])
        touching = stage.touch(1)
        stage.request(1)
        stage.urgent.sendall(stage.pages(1, 2))
        assert touching.done() == stage.content(2)
        assert userfaultfds() == {stage.uffd.fd}
    return ends


def userfaultfds() -> set[int]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one through which it is listed
            if "userfaultfd" in str(entry.readlink()):
                found.add(int(entry.name))
    return found


def test_a_child_never_sees_zeros_and_its_parent_is_served_on() -> None:
    ends = run_in_child(forking)
    assert os.waitstatus_to_exitcode(ends[0]) == 1  # what the first page holds
    assert os.waitstatus_to_exitcode(ends[1]) == -signal.SIGBUS


def moving() -> str:
    with foreign(Feature.EVENT_REMAP) as stage:
        to = calls.map_anonymous(stage.page_size)
        calls.remap(stage.mapping.address + 4 * stage.page_size, stage.page_size, to=to)
        stage.finished()
        return str(stage.pump.status().error)


def test_memory_that_moves_cannot_be_followed() -> None:
    assert "following memory that was moved (mremap)" in run_in_child(moving)


def moving_after_the_end() -> tuple[str, bool]:
    with foreign(Feature.EVENT_REMAP) as stage:
        stage.push.sendall(stage.frame(FrameType.ZERO, 0, 8) + END)
        stage.finished()
        os.read(stage.pump.event_fd, 8)
        assert (stage.pump.status().state, stage.pump.status().resident) == ("complete", True)
        to = calls.map_anonymous(stage.page_size)
        calls.remap(stage.mapping.address + 4 * stage.page_size, stage.page_size, to=to)
        stage.finished()
        return str(stage.pump.status().error), stage.pump.status().resident


def test_a_pump_that_can_serve_no_more_says_so_although_every_page_came() -> None:
    error, resident = run_in_child(moving_after_the_end)
    assert "following memory that was moved (mremap)" in error
    assert resident


def blocking() -> int:
    with foreign(Feature(0)) as stage:
        os.set_blocking(os.dup(stage.uffd.fd), True)
        stage.push.sendall(stage.pages(0, 1))
        touching = stage.touch(1)
        stage.request(1)
        stage.urgent.sendall(stage.pages(1, 2))
        assert touching.done() == stage.content(2)
        os.set_blocking(stage.uffd.fd, True)
        assert stage.uffd.read() == []
        until(lambda: stage.pump.snapshot().pages_resident == 2, "the page that was pushed")
        stage.pump.stop()
        return stage.pump.snapshot().pages_resident


def test_another_holder_cannot_make_the_pump_wait_for_a_fault() -> None:
    assert run_in_child(blocking) == 2


def test_all_that_a_foreign_process_may_tell_has_to_be_taken_note_of() -> None:
    with pytest.raises(HostError, match="Invalid argument"):
        Stage("anonymous", 8, removal=Removal.UNTOLD, foreign=True)
    with pytest.raises(HostError, match="Invalid argument"):
        Stage("anonymous", 8, Placement.MOVE, removal=Removal.DISCARDS, foreign=True)
