"""What a kind of guest makes ready for one that comes: it leaves nothing behind, and the guest that comes is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from postcopy.guest import Guest
from postcopy.guest.kinds import kind_named
from tests.guest.memory import PAGE, Memory


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize(("pages", "vcpus"), [(1, 1), (16, 2), (3, 64)])
def test_the_place_for_a_guest_is_tried_without_touching_its_memory(pages: int, vcpus: int) -> None:
    with Memory(pages) as there, Memory(pages) as here:
        before = threads()
        empty = kind_named("emulated").empty([here], vcpus)
        assert here.allocated() == 0
        assert threads() <= before  # one of an earlier test may just have ended
        with Guest([there], vcpus=vcpus, seed=7, blank=0.0, steps_max=50) as guest:
            guest.fill()
            guest.start()
            guest.wait()
            guest.stop()
            state, content = guest.save(), there.read()
        with empty.load(state) as came:
            here.write(content)
            assert came.steps() == [50] * vcpus
            assert came.check().pages_mismatched == 0
            assert here.allocated() == len(content) // PAGE
        empty.close()
