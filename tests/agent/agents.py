"""Daemons and commands as real processes: started, waited for by conditions with deadlines, always reaped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from agent.admin import admin_address, ask
from agent.summary import rows
from postcopy.errors import PostcopyError

ROOT = Path(__file__).parent.parent.parent
AGENT = [sys.executable, "-m", "agent"]
# As a user without any right, once all modules are loaded: Python itself may lie where that user cannot read.
NOBODY = 65534
_AS_NOBODY = """
import encodings.ascii, encodings.idna, importlib, os, pkgutil, sys, agent
for module in pkgutil.walk_packages(agent.__path__, 'agent.'):
    if not module.name.endswith(('.__main__', '.build')):
        importlib.import_module(module.name)
from agent import cli
os.setgroups([]); os.setgid(65534); os.setuid(65534)
cli.main(sys.argv[1:])
"""
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1",
    "POSTCOPY_CONFIG": os.devnull, "POSTCOPY_LOG_FORMAT": "text",
}  # fmt: skip
START_SECONDS = 40
LOSS_SECONDS = 10  # within which a loss has to be told


AS_NOBODY = [sys.executable, "-c", _AS_NOBODY]


class Result:
    """How a command ended: `status`, `out`, `err`, and `seconds` it took."""

    def __init__(self, status, out, err, seconds):
        self.status, self.out, self.err, self.seconds = status, out, err, seconds

    @property
    def json(self):
        return json.loads(self.out)

    def one_line(self):
        """The error as people see it: exactly one line, no traceback."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("postcopy: ")
        return lines[0]


def run(*arguments, deadline=90, inside=(), program=AGENT, **options):
    """Run one command to its end."""
    start = time.monotonic()
    done = subprocess.run(
        [*inside, *program, *map(str, arguments)],
        capture_output=True, text=True, timeout=deadline, cwd=ROOT, env=ENVIRONMENT, check=False, **options,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr, time.monotonic() - start)


class Command:
    """A command that runs beside the test."""

    def __init__(self, *arguments, inside=()):
        self.start = time.monotonic()
        self.process = subprocess.Popen(
            [*inside, *AGENT, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(ValueError):
            self.process.communicate()

    def result(self, deadline=LOSS_SECONDS):
        out, err = self.process.communicate(timeout=deadline)
        return Result(self.process.returncode, out, err, time.monotonic() - self.start)


class Daemon:
    """A daemon with an admin socket in `folder`; its log is a file there."""

    def __init__(self, folder, role, *arguments, inside=(), keep=(), before=(), **options):
        self.role = role
        self.admin = f"unix:{folder}/{role}.sock"
        self.log_file = Path(folder) / f"{role}.log"
        read_fd, write_fd = os.pipe()
        command = [*inside, *AGENT, *before, role, *map(str, arguments)]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--admin", self.admin, "--ready-fd", str(write_fd)],
                pass_fds=[write_fd, *keep], stdout=log, stderr=log, cwd=ROOT, env=ENVIRONMENT, **options,
            )  # fmt: skip
        os.close(write_fd)
        try:
            ready, _, _ = select.select([read_fd], [], [], START_SECONDS)
            told = os.read(read_fd, 4096).decode() if ready else ""
        finally:
            os.close(read_fd)
        self.ready = told.startswith("READY=1\n")
        found = re.search(r"X_ADDRESS=(.*)", told)
        self.address = found[1] if found else None

    def __enter__(self):
        assert self.ready, self.log
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()

    @property
    def log(self):
        return self.log_file.read_text()

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, deadline=LOSS_SECONDS):
        return self.process.wait(deadline)

    def status(self):
        return self.ask("status")

    def ask(self, command, **arguments):
        """Ask over the admin socket, as the commands do but without a process for each."""
        try:
            return asyncio.run(ask(admin_address(self.admin), command, arguments))
        except PostcopyError as error:
            raise AssertionError(f"{self.role}: {error}\n{self.process.poll()}\n{self.log}") from error

    def until(self, wanted, deadline=40):
        """Ask for the status until it is as wanted, and return it."""
        end = time.monotonic() + deadline
        while not wanted(status := self.status()):
            assert time.monotonic() < end, (status, self.log)
            time.sleep(0.01)  # between two looks, not to force an order
        return status

    def until_log(self, pattern, deadline=30):
        """Wait until the log holds a line like `pattern`, and return the match."""
        end = time.monotonic() + deadline
        while not (found := re.search(pattern, self.log)):
            assert time.monotonic() < end, self.log
            time.sleep(0.01)  # between two looks, not to force an order
        return found

    def runs_on(self):
        """See that each vCPU of the guest here makes steps."""
        first = self.status()
        assert first["guest"] is not None
        steps = first["guest"]["steps"]
        self.until(lambda now: all(more > some for some, more in zip(steps, now["guest"]["steps"], strict=True)))


def source(folder, *arguments, size="64MiB", **options):
    return Daemon(folder, "source", "--size", size, *arguments, **options)


def destination(folder, *arguments, **options):
    return Daemon(folder, "destination", *arguments, **options)


def scrape(url):
    """Return the samples of a metrics endpoint: {name with labels: value}."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def check_lost_times(report):
    """What is known is said, also of a guest that is lost, and nothing else is."""
    for never in ("total_seconds", "resident_seconds", "throughput_bytes_per_second"):
        assert report[never] is None
    assert report["downtime_seconds"] > 0
    assert report["cpu_seconds"]["source"] is None
    assert report["cpu_seconds"]["destination"] > 0
    said = dict(rows(report))
    assert said["total time"] == "unknown"
    assert said["CPU"].startswith("source unknown, destination ")
    assert said["bytes"].endswith(" placed, unknown rate")
    assert f", {report['pages']['lost']} lost; " in said["pages"]
    assert dict(rows({**report, "downtime_seconds": None}))["downtime"] == "unknown"  # of hosts that share no clock


def given_up(there, pages, text="the guest goes on without"):
    """See that a guest of so many pages (4 KiB) goes on without those that are lost, and end its agent; how many."""
    status = there.until(lambda now: now["state"] == "lost" and now["ended"] is not None)
    assert (status["owner"], status["ended"]["exit_status"]) == ("lost", 6)
    lost = status["report"]["pages"]["lost"]
    there.until_log(text)
    there.runs_on()
    met = there.until(lambda now: now["guest"]["lost_steps"] > 0)["guest"]
    assert (met["trouble"], status["report"]["outcome"]) == (None, "lost")
    check_lost_times(status["report"])
    extents = status["report"]["details"]["lost_extents"]
    assert extents
    assert sum(length for _, _, length in extents) <= 4096 * lost
    found = there.ask("check")
    assert (found["pages_checked"], found["pages_lost"], found["pages_mismatched"]) == (pages - lost, lost, 0)
    there.runs_on()
    there.signal(signal.SIGTERM)
    assert there.wait() == 6
    assert f"the guest is lost: {lost} pages that did not come are gone" in there.log
    assert "Traceback" not in there.log
    return lost
