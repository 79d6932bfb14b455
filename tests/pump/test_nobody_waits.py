"""Pages that are given back: of whoever waited nobody is waited for, and whoever gives back waits for nobody."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from postcopy.pump.regions import Removal
from tests.child import run_in_child
from tests.pump.stage import DEADLINE, Stage, until
from tests.pump.test_removal import ZERO, Call, give_back

# A process that reads a byte of another one's memory.
READER = """
import ctypes, sys
class IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))
room = ctypes.create_string_buffer(1)
here, there = IoVec(ctypes.addressof(room), 1), IoVec(int(sys.argv[2]), 1)
ctypes.CDLL(None).process_vm_readv(int(sys.argv[1]), ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
"""


def nobody_waits_any_more(by_call: bool) -> None:
    """Who waited for a page that was given back has been killed, and never touches it again."""
    with Stage("anonymous", 2, removal=Removal.DISCARDS) as stage:
        address = stage.mapping.address + stage.page_size
        reader = subprocess.Popen([sys.executable, "-c", READER, str(os.getpid()), str(address)])
        stage.request(1)
        reader.kill()
        reader.wait(DEADLINE)
        assert stage.pump.snapshot().pending == 1
        if by_call:
            stage.pump.discard(0, stage.page_size, stage.page_size)
        else:
            give_back(stage, 1, 1, "MADV_DONTNEED")
        until(lambda: stage.pump.snapshot().pending == 0, "the end of its fault")


@pytest.mark.parametrize("by_call", [True, False])
def test_a_fault_whose_page_was_given_back_is_over_although_nobody_touches_it_again(by_call: bool) -> None:
    run_in_child(nobody_waits_any_more, by_call)


def more_wait_than_there_is_room_for() -> None:
    with Stage("anonymous", 1034, removal=Removal.DISCARDS) as stage:
        guests = [stage.touch(page) for page in range(1024)]
        assert stage.requested(1024) == set(range(1024))
        late = [stage.touch(page) for page in range(1024, 1032)]
        Call(give_back, stage, 1033, 1, "MADV_DONTNEED").done()
        until(lambda: stage.state(1033) == ZERO)
        for page in range(1033):
            stage.push.sendall(stage.pages(page, page % 251))
        assert [guest.done()[0] for guest in guests + late] == [page % 251 for page in range(1032)]
        until(lambda: stage.pump.status().state == "complete", "the last page")


def test_who_gives_back_does_not_wait_for_those_that_wait_for_pages() -> None:
    run_in_child(more_wait_than_there_is_room_for)
