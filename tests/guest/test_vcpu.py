"""The vCPU threads: let go, stopped, stuck in a fault, clocked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from postcopy.guest import Guest, GuestStuckError
from tests.child import run_in_child
from tests.guest.memory import PAGE, Faults, Memory
from tests.guest.test_state import until


def status(tid: int, field: str) -> str:
    lines = Path(f"/proc/self/task/{tid}/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{field}:"))


def test_threads_have_names_and_block_all_signals() -> None:
    with Memory(16) as memory, Guest([memory], vcpus=3) as guest:
        assert len(set(guest.tids)) == 3
        assert [status(tid, "Name") for tid in guest.tids] == ["vcpu-0", "vcpu-1", "vcpu-2"]
        for tid in guest.tids:
            # All but SIGKILL, SIGSTOP and the two that the C library keeps for itself.
            assert int(status(tid, "SigBlk"), 16) == (1 << 64) - 1 - (1 << 8) - (1 << 18) - (3 << 31)
        tids = guest.tids
    assert not any(Path(f"/proc/self/task/{tid}").exists() for tid in tids)


def test_threads_are_pinned() -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    with Memory(16) as memory, Guest([memory], vcpus=3, cpus=cpus) as guest:
        allowed = [status(tid, "Cpus_allowed_list") for tid in guest.tids]
        assert allowed == [str(cpus[0]), str(cpus[-1]), str(cpus[0])]


def test_parked_means_no_step() -> None:
    with Memory(64) as memory, Guest([memory], vcpus=2) as guest:
        guest.fill()
        for _ in range(200):
            before = guest.steps()
            guest.start()
            guest.stop()
            stopped, data = guest.steps(), memory.read()
            assert all(b <= s for b, s in zip(before, stopped, strict=True))
            assert (guest.steps(), memory.read()) == (stopped, data)
        assert guest.check().pages_mismatched == 0


def test_times_of_the_first_and_last_step() -> None:
    with Memory(64) as memory, Guest([memory], steps_max=100) as guest:
        guest.fill()
        assert (guest.first_step_at, guest.last_step_at) == (None, None)
        before = time.monotonic()
        guest.start()
        guest.wait()
        first, last = guest.first_step_at, guest.last_step_at
        assert first is not None
        assert last is not None
        assert before < first < last < time.monotonic()
        guest.stop()
        assert (guest.first_step_at, guest.last_step_at) == (first, last)
        guest.limit(200)
        guest.start()
        guest.wait()
        assert guest.steps() == [200, 200]
        again = guest.first_step_at
        assert again is not None
        assert again > last


def test_waiting_for_a_limit_names_who_is_below_it() -> None:
    with Memory(64) as memory, Guest([memory], steps_max=10) as guest:
        with pytest.raises(GuestStuckError, match="vCPU 0, 1 did not reach its limit"):
            guest.wait(deadline=0.01)
        guest.start()
        guest.wait()


def test_a_raised_limit_lets_a_running_guest_go_on() -> None:
    with Memory(64) as memory, Guest([memory], steps_max=10) as guest:
        guest.fill()
        guest.start()
        guest.wait()
        assert guest.check().pages_mismatched == 0
        guest.limit(20)
        guest.wait()
        assert guest.steps() == [20, 20]
        guest.limit(None)
        until(lambda: min(guest.steps()) > 1000)


def test_a_running_guest_refuses_what_needs_it_stopped() -> None:
    with Memory(64) as memory, Guest([memory]) as guest:
        guest.fill()
        guest.start()
        for refused in (guest.save, guest.check, lambda: guest.limit(5)):
            with pytest.raises(RuntimeError, match="stop it first"):
                refused()
        until(lambda: min(guest.steps()) > 0)
        guest.stop()
        with pytest.raises(RuntimeError, match="undo"):
            guest.fill()


def test_a_closed_guest_says_so() -> None:
    with Memory(64) as memory:
        guest = Guest([memory])
        guest.start()
        guest.close()
        guest.close()
        with pytest.raises(RuntimeError, match="closed"):
            guest.steps()


def test_pace_is_kept() -> None:
    with Memory(64) as memory, Guest([memory], steps_per_second=50, steps_max=11, vcpus=1) as guest:
        began = time.monotonic()
        guest.start()
        guest.wait()
        # Never faster; how much slower is up to the machine.
        assert time.monotonic() - began >= 0.199
        assert guest.stall.sum_ns < 100_000_000, "waiting for the next step is no stall"


def test_a_paced_guest_stops_at_once() -> None:
    with Memory(64) as memory, Guest([memory], steps_per_second=1, vcpus=2) as guest:
        guest.start()
        until(lambda: min(guest.steps()) == 1)
        guest.stop(deadline=0.9)  # a second would be the next step
        assert guest.steps() == [1, 1]


def test_an_interpreter_that_forgets_to_close_ends_well() -> None:
    code = (
        "from tests.guest.memory import Memory; from postcopy.guest import Guest; "
        "g = Guest([Memory(64)]); g.fill(); g.start()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def stuck_then_served() -> tuple[list[int], list[int], float, float, int]:
    memory = Memory(64)
    faults = Faults(memory)
    guest = Guest([memory], workload="sequential", vcpus=2)
    guest.start()
    waiting = [faults.next(), faults.next()]
    began = time.monotonic()
    with pytest.raises(GuestStuckError, match=r"vCPU 0, 1 did not stop within 0\.05 s"):
        guest.stop(deadline=0.05)
    assert guest.steps() == [0, 0]
    held = time.monotonic() - began
    for address in waiting:
        faults.serve(address)
    guest.stop()
    pages = sorted((address - memory.address) // PAGE for address in waiting)
    return pages, guest.steps(), held, guest.stall.max_ns / 1e9, guest.stall.count


def test_a_vcpu_in_a_fault_is_named_and_stops_after_it() -> None:
    pages, steps, held, stall, count = run_in_child(stuck_then_served)
    assert pages == [0, 28], "each vCPU begins at its own page"
    assert steps == [1, 1], "one step more, the one it was in"
    assert stall >= held, "the clock saw the whole wait"
    assert count == 2


def stop_given_up() -> list[int]:
    memory = Memory(64)
    faults = Faults(memory)
    guest = Guest([memory], workload="sequential", vcpus=1, steps_max=3)
    guest.start()
    address = faults.next()
    with pytest.raises(GuestStuckError):
        guest.stop(deadline=0.01)
    guest.start()
    faults.serve(address)
    for _ in range(2):
        faults.serve(faults.next())
    guest.wait()
    assert guest.first_step_at is not None
    return guest.steps()


def test_a_stop_that_failed_can_be_taken_back() -> None:
    assert run_in_child(stop_given_up) == [3]


def close_while_stuck() -> list[int]:
    memory = Memory(64)
    faults = Faults(memory)
    guest = Guest([memory], vcpus=1)
    guest.start()
    address = faults.next()
    with pytest.raises(GuestStuckError, match="did not end"):
        guest.close(deadline=0.01)
    steps = guest.steps()  # nothing was freed
    faults.serve(address)
    guest.close()
    return steps


def test_close_frees_nothing_under_a_stuck_vcpu() -> None:
    assert run_in_child(close_while_stuck) == [0]
