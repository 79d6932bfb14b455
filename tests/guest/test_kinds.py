"""What a kind of guest makes ready for one that comes: it leaves nothing behind, and the guest that comes is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from postcopy.errors import ProtocolError
from postcopy.guest import Guest
from postcopy.guest.kinds import kind_named
from tests.guest.memory import PAGE, Memory


def threads() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


@pytest.mark.parametrize(("pages", "vcpus"), [(1, 1), (16, 2), (3, 64)])
def test_the_place_for_a_guest_is_tried_without_touching_its_memory(pages: int, vcpus: int) -> None:
    with Memory(pages) as there, Memory(pages) as here:
        before = threads()
        empty = kind_named("emulated").empty([here], vcpus)
        assert here.allocated() == 0
        with Guest([there], vcpus=vcpus, seed=7, blank=0.0, steps_max=50) as guest:
            guest.fill()
            guest.start()
            guest.wait()
            guest.stop()
            state, content = guest.save(), there.read()
        ready = threads()
        with empty.load(state) as came:
            assert threads() <= ready  # they were made before
            assert {str(tid) for tid in came.tids} <= ready - before
            here.write(content)
            assert came.steps() == [50] * vcpus
            assert came.check().pages_mismatched == 0
            assert here.allocated() == len(content) // PAGE
        empty.close()
    assert not threads() - before


def test_a_place_that_no_guest_came_to_leaves_nothing() -> None:
    with Memory(16) as here:
        before = threads()
        empty = kind_named("emulated").empty([here], 2)
        with Guest([here], vcpus=3) as other, pytest.raises(ProtocolError, match="of 3 vCPUs, 2 are ready here"):
            empty.load(other.save())
        with pytest.raises(ProtocolError, match="not a map"):
            empty.load(7)
        empty.close()
        empty.close()
        assert not threads() - before


def test_a_guest_that_has_begun_becomes_no_other() -> None:
    with Memory(16) as memory, Guest([memory], steps_max=3) as guest:
        state = guest.save()
        guest.become(state)
        guest.fill()
        guest.start()
        guest.wait()
        guest.stop()
        with pytest.raises(RuntimeError, match="has run"):
            guest.become(state)
        assert guest.steps() == [3, 3]
        assert guest.check().pages_mismatched == 0
