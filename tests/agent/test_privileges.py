"""What the daemons may do: no more than they need, on every thread, and that is enough for all that they do."""

import os
import re
from pathlib import Path

import pytest

from agent.security.privileges import CAP_SYS_NICE, CAP_SYS_PTRACE, KEPT
from tests.child import run_in_child
from tests.lacking import lacking

from .agents import destination, run, source

ALLOWED = sum(1 << capability for capability in KEPT)


def threads(pid):
    """What each thread of a process may do: its name and its sets."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        text = (task / "status").read_text()
        sets = {name: int(value, 16) for name, value in re.findall(r"Cap(\w+):\t(\w+)", text)}
        yield re.search(r"Name:\t(.*)", text)[1], sets, re.search(r"NoNewPrivs:\t(\d)", text)[1]


@pytest.fixture(autouse=True)
def as_root():
    if os.geteuid():
        lacking("these tests look at what root gives up")


def test_no_thread_of_a_daemon_can_do_more_than_it_needs(tmp_path):
    with destination(tmp_path) as there, source(tmp_path, "--steps-per-second", "1000", size="16MiB") as here:
        done = run("migrate", "--admin", here.admin, there.address, "--json")
        assert done.status == 0, done.err
        for daemon in (here, there):
            seen = list(threads(daemon.process.pid))
            assert len(seen) > 1
            for name, sets, no_new in seen:
                assert no_new == "1", name
                assert (sets["Inh"], sets["Amb"]) == (0, 0), name
                for one in ("Prm", "Eff", "Bnd"):
                    assert sets[one] & ~ALLOWED == 0, (name, one)
                assert sets["Eff"] >> CAP_SYS_PTRACE & 1, name
        again = run("check", "--admin", there.admin, "--json")
        assert again.json["pages_mismatched"] == 0


def test_what_is_kept_is_enough_for_one_after_the_other(tmp_path):
    """Each who asks has memory allocated and a userfaultfd opened for it, long after the start."""
    with destination(tmp_path) as there, source(tmp_path, size="8MiB") as here:
        for _ in range(2):
            asked = run("doctor", "--peer", there.address, "--json")
            assert (asked.status, asked.json["peer"]["works"]) == (0, True), asked.err
        assert run("migrate", "--admin", here.admin, there.address).status == 0
        there.runs_on()


def niceness_of_a_thread():
    """What sched_setattr(2) lets a thread have, with the daemons' capabilities and without any."""
    from agent.security import privileges

    found = []
    privileges.drop()
    os.nice(-5)
    found.append(os.nice(0))
    privileges.KEPT = {}
    privileges.drop()
    try:
        os.nice(-5)
    except PermissionError:
        found.append("refused")
    try:
        os.chown("/proc/self/cwd", 1, 1)
    except PermissionError:
        found.append("refused")
    return found


def test_the_thread_that_serves_faults_may_still_go_before_others():
    assert 1 << CAP_SYS_NICE & ALLOWED
    assert run_in_child(niceness_of_a_thread) == [-5, "refused", "refused"]
