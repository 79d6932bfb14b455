"""The units, without a systemd that runs (test_booted.py has one): what systemd-analyze says of them, and what a daemon
that is started by their command line tells its notification socket."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent import notify
from agent.metrics import Figures
from postcopy.session.states import State
from tests.agent.agents import ENVIRONMENT, ROOT, run
from tests.programs import say

SYSTEMD = ROOT / "deploy/systemd"
UNITS = sorted(SYSTEMD.glob("*.service"))
AGENTS = [unit for unit in UNITS if "@" not in unit.name]
# Runs a command under the kernel's own MemoryDenyWriteExecute (prctl(2), PR_SET_MDWE).
WITHOUT_EXECUTABLE_DATA = """
import ctypes, mmap, os, sys
assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)
    raise SystemExit("this kernel lets data be executed")
except PermissionError:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def settings(unit: Path) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_units_are_understood(unit: Path, tmp_path: Path) -> None:
    for one in UNITS:
        (tmp_path / one.name).write_text(one.read_text().replace("/usr/bin/postcopy", "/bin/true"))
    here = tmp_path / unit.name
    done = say("systemd-analyze", "verify", here)
    # An unknown key is only said, not counted.
    assert (done.returncode, done.stderr.strip()) == (0, "")
    here.write_text(here.read_text().replace("RestrictRealtime=", "RestrictRealTime="))
    assert "RestrictRealTime" in say("systemd-analyze", "verify", here).stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_units_are_hardened(unit: Path) -> None:
    done = say("systemd-analyze", "security", "--offline=true", "--threshold=30", unit)
    assert done.returncode == 0, done.stdout


def test_the_user_of_the_units_is_made(tmp_path: Path) -> None:
    users = {settings(unit)["User"] for unit in UNITS}
    done = say("systemd-sysusers", "--dry-run", f"--root={tmp_path}", SYSTEMD / "postcopy-sysusers.conf")
    assert users == {"postcopy"}
    assert "Creating user 'postcopy'" in done.stdout + done.stderr
    rule = (SYSTEMD / "60-postcopy.rules").read_text()
    assert re.search(r'^KERNEL=="userfaultfd", GROUP="postcopy", MODE="0660"$', rule, re.MULTILINE)


@pytest.mark.parametrize("unit", AGENTS, ids=lambda unit: unit.stem)
def test_a_daemon_runs_as_its_unit_says(unit: Path, tmp_path: Path) -> None:
    program, option, file, role = settings(unit)["ExecStart"].split()
    assert (program, option) == ("/usr/bin/postcopy", "--config")
    example = SYSTEMD / Path(file).name
    assert run("config", "check", example).status == 0
    where = tmp_path / "notify"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(str(where))
    listening.settimeout(40)
    section = role.upper()
    environment = {
        **ENVIRONMENT, "NOTIFY_SOCKET": str(where), "WATCHDOG_USEC": "200000",
        f"POSTCOPY_{section}_ADMIN": f"unix:{tmp_path}/admin", f"POSTCOPY_{section}_METRICS": "127.0.0.1:0",
        "POSTCOPY_SOURCE_KEEPER": f"unix:{tmp_path}/keeper",
        "POSTCOPY_SOURCE_MEMORY": "shmem:8MiB", "POSTCOPY_DESTINATION_LISTEN": "tcp:127.0.0.1:0",
    }  # fmt: skip
    environment.pop("WATCHDOG_PID", None)
    command = [sys.executable, "-c", WITHOUT_EXECUTABLE_DATA, "-m", "agent", "--config", str(example), role]
    with listening, subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True) as daemon:
        try:
            first = listening.recv(4096).decode()
            assert first.startswith("READY=1\n"), first
            told = [listening.recv(4096).decode() for _ in range(5)]
            assert [one.splitlines()[-1] for one in told] == ["WATCHDOG=1"] * 5
            words = "owns a guest" if role == "source" else "no guest is here; latest migration: none"
            assert f"STATUS={words}\n" in told[0]
            daemon.send_signal(signal.SIGTERM)
            while "STOPPING=1\n" not in listening.recv(4096).decode():
                pass
            assert daemon.wait(20) == 0
        finally:
            daemon.kill()
            said = daemon.stderr.read() if daemon.stderr else ""
    assert "internal error" not in said, said


def test_a_watchdog_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert notify.watchdog_seconds() == 2.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert notify.watchdog_seconds() is None


def test_how_a_daemon_stands() -> None:
    active = Figures("destination", State.POSTCOPY_ACTIVE, owns_guest=True, remaining_bytes=3 << 20)
    assert notify.in_words(active) == "postcopy-active: 3 MiB of the guest's memory are still at the source"
    assert notify.in_words(Figures("source", State.FAILED, owns_guest=True)) == "owns a guest; latest migration: failed"
    assert notify.in_words(Figures("destination", State.SETUP)) == "setup: a guest is about to come"


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nothing"))
    began = time.monotonic()
    notify.tell("READY=1\n")
    assert time.monotonic() - began < 5


def test_figures_that_cannot_be_had_do_not_end_what_systemd_waits_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    looks = iter([True, True, False])

    def figures() -> Figures:
        if next(looks, False):
            raise ZeroDivisionError("a mistake of ours")
        return Figures("source", State.NONE, owns_guest=True)

    async def story(listening: socket.socket) -> list[str]:
        telling = asyncio.create_task(notify.keep_telling(figures))
        told = [(await asyncio.get_running_loop().sock_recv(listening, 4096)).decode() for _ in range(3)]
        telling.cancel()
        return told

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.setblocking(False)
        told = asyncio.run(asyncio.wait_for(story(listening), 10))
    unknown = "STATUS=how it stands is not known: see its log\nWATCHDOG=1\n"
    assert told == [unknown, unknown, "STATUS=owns a guest\nWATCHDOG=1\n"]
    assert [record.exc_info is not None for record in caplog.records if record.name == "postcopy.agent"] == [True]
