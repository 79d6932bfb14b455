"""Commands that are ended from outside: nothing is left behind, and one line says what became of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .agents import AGENT, ENVIRONMENT, ROOT, Command, destination, run, source

# Ends only when it is told to: its push would take days.
ENDLESS = ("--size", "8MiB", "--max-postcopy-bandwidth", "1B/s")


def daemons(folder):
    """Command lines of the processes that were told of the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes()
        except OSError:
            continue
        if b"agent" in command and b"--admin" in command and str(folder).encode() in command:
            found.append(command)
    return found


def until(wanted, deadline=20):
    end = time.monotonic() + deadline
    while not (found := wanted()):
        assert time.monotonic() < end
        time.sleep(0.02)  # between two looks
    return found


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGINT, 130, "postcopy: interrupted"),
        (signal.SIGTERM, 143, "postcopy: ended by SIGTERM"),
        (signal.SIGHUP, 129, "postcopy: ended by SIGHUP"),
        (signal.SIGKILL, -9, None),
    ],
)
def test_a_demo_leaves_nothing_behind(number, status, line, tmp_path):
    with Command("demo", *ENDLESS, inside=["env", f"TMPDIR={tmp_path}"]) as demo:
        until(lambda: any("device -> postcopy-active" in log.read_text() for log in tmp_path.glob("*/source.log")))
        assert len(daemons(tmp_path)) == 2
        demo.process.send_signal(number)
        done = demo.result(20)
    assert done.status == status, done.err
    if line is not None:
        assert done.err.strip().splitlines()[-1] == line
        assert daemons(tmp_path) == []
        assert list(tmp_path.iterdir()) == []
    else:  # nobody waits for them, so they may take a moment
        until(lambda: not daemons(tmp_path))
        assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_modules_are_loaded():
    code = """
import builtins, os, signal, sys
load = builtins.__import__
def interrupted(name, *rest):
    if name == "click":
        os.kill(os.getpid(), signal.SIGINT)
    return load(name, *rest)
builtins.__import__ = interrupted
sys.argv = ["postcopy", "--help"]
from agent.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "postcopy: interrupted\n")


def test_output_that_cannot_be_written():
    with Path("/dev/full").open("w") as full:
        for arguments in (["demo", "--size", "4MiB"], ["demo", "--size", "4MiB", "--json"], ["--help"]):
            done = subprocess.run(
                [*AGENT, *arguments],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=ENVIRONMENT,
                check=False,
            )
            assert done.returncode == 1
            assert done.stderr.splitlines()[-1].endswith("No space left on device")
            assert "internal error" not in done.stderr
            assert "Exception ignored" not in done.stderr


def test_a_daemon_ends_with_its_parent(tmp_path):
    read_fd, write_fd = os.pipe()
    folder = tmp_path / "scratch"
    folder.mkdir()
    with destination(folder, "--end-with-fd", read_fd, "--scratch", folder, keep=[read_fd]) as there:
        os.close(read_fd)
        assert there.status()["state"] == "none"
        os.close(write_fd)
        assert there.wait() == 0
    assert not folder.exists()


def test_a_check_is_waited_for(tmp_path):
    """The guest is not taken away from under a check, and the check is answered."""
    with source(tmp_path, "--workload", "increment", size="512MiB") as here:
        ended_while_checking(here)


def test_a_check_is_waited_for_at_the_destination(tmp_path):
    with destination(tmp_path) as there, source(tmp_path, "--workload", "increment", size="512MiB") as here:
        assert run("migrate", "--admin", here.admin, there.address).status == 0
        there.until(lambda now: now["state"] == "completed")
        ended_while_checking(there)


def ended_while_checking(daemon):
    with Command("check", "--admin", daemon.admin, "--json") as check:
        until(lambda: daemon.status()["in_use"] == "a check")
        daemon.signal(signal.SIGTERM)
        done = check.result(30)
    assert done.status == 0, done.err
    assert done.json["pages_mismatched"] == 0
    assert daemon.wait() == 0


def test_metrics_for_anybody_are_warned_of(tmp_path):
    with destination(tmp_path, "--metrics", "0.0.0.0:0") as there:
        assert there.log.count("is beyond this host: anybody who reaches it may read") == 1
    with destination(tmp_path, "--metrics", "127.0.0.1:0") as there:
        assert "anybody" not in there.log


def test_a_bandwidth_of_none_is_no_limit():
    done = run("demo", "--size", "8MiB", "--max-postcopy-bandwidth", "0", "--json")
    assert done.status == 0, done.err
