"""Processes that keep a guest's memory, as tests look at them: what each is called with, stopped, ended."""

import contextlib
import os
import signal
from pathlib import Path

from agent import keeper as process
from postcopy.link.keeping import Record
from tests.chaos.proxy import wait_for

KEEPER = process.__file__
RECORD = Record(
    version=3, migration_id=b"m" * 16, token=b"t" * 32, address="tcp:127.0.0.1:7000", elsewhere="",
    regions=(("shmem", 4096, 8192),), guest=("emulated", 2), tls=False, state=b"", push=True, held=False, rate=None,
    started=1.0, stopped=2.0, stopped_at=2.0, run_sent=3.0,
)  # fmt: skip


def end_keepers_of(folder):
    """End what a test that failed leaves behind: it would wait for ever."""
    for one in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            said = one.read_text().split("\0")
            if KEEPER in said and any(word.startswith(f"{folder}/") for word in said):
                os.kill(int(one.parent.name), signal.SIGKILL)


def gone(keeper):
    wait_for(lambda: not Path(keeper.removeprefix("unix:")).exists(), "the keeper stays")


def pid_of(keeper):
    """The process that keeps there, None where none does."""
    for one in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if {KEEPER, keeper.removeprefix("unix:")} <= set(one.read_text().split("\0")):
                return int(one.parent.name)
    return None


def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: " T " in Path(f"/proc/{pid}/stat").read_text(), "it does not stop")
