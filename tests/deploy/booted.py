"""A systemd of one's own: Debian's, as process 1 of namespaces, which knows the project's units and nothing else.

Our units enter as they are, but for where the program lies, and the configuration of each; what systemd made of them is
asked by systemctl. Nothing of this host is changed: what is written to in there (/run, /srv, /opt, /tmp, /var/tmp, the
device) is of its own, network, host name and shared memory too; all else, kernel settings among it, can only be read,
and its console is nowhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from tests.agent.agents import ROOT
from tests.lacking import lacking
from tests.programs import outside, say

SYSTEMD = Path("/lib/systemd/systemd")
DEVICE = Path("/dev/userfaultfd")
UNITS = ROOT / "deploy/systemd"
# What every unit stands behind, without anything of Debian's.
TARGETS = ("default", "sysinit", "basic", "multi-user", "shutdown", "network-online", "umount", "final")
DEADLINE = 30

# All that is of this host is brought together at first: what it lies below may be hidden by what follows.
BOOT = """
set -e
mount --make-rprivate /
{ip} link set lo up
cd {folder}
mount -t tmpfs tmpfs stage
mkdir stage/python stage/postcopy stage/bin stage/etc
mount --bind {python} stage/python
mount --bind {root} stage/postcopy
for place in python postcopy; do mount -o remount,bind,ro stage/$place; done
cp postcopy stage/bin
cp -r units stage
cp /etc/passwd /etc/group *.toml stage/etc
mount --rbind stage /opt
cd /opt
mount --bind /dev/null /dev/console
for place in /run /srv /tmp /var/tmp /dev/shm; do mount -t tmpfs tmpfs $place; done
for place in / /dev /sys; do mountpoint -q $place && mount -o remount,bind,ro $place; done
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
umount -l /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
echo 'postcopy:x:64999:64999::/:/usr/sbin/nologin' >>etc/passwd
echo 'postcopy:x:64999:' >>etc/group
for file in passwd group; do mount --bind etc/$file /etc/$file; done
mkdir -p /run/etc/postcopy
mv etc/*.toml /run/etc/postcopy
mknod -m 660 /srv/userfaultfd c {major} {minor}
chgrp 64999 /srv/userfaultfd
mount --bind /srv/userfaultfd /dev/userfaultfd
exec env -i container=test SYSTEMD_UNIT_PATH=/opt/units SYSTEMD_GENERATOR_PATH=/srv/none PATH=/usr/bin:/bin \\
    {systemd} --system --unit=default.target --log-target=console --log-level=info --show-status=no --crash-reboot=no
"""
PROGRAM = """#!/bin/sh
export PYTHONPATH=/opt/postcopy:/opt/postcopy/{packages} PYTHONDONTWRITEBYTECODE=1
export LD_LIBRARY_PATH=/opt/python/lib  # or it would be another Python's library
exec /opt/python/{python} -m agent "$@"
"""


class Booted:
    """systemd, running; `files` are the configurations by the names that the units know them by.

    `more` is what a unit is told beside what it says itself. Skipped where this host lacks what it takes.
    """

    def __init__(self, folder: Path, files: dict[str, str], more: dict[str, str] | None = None) -> None:
        self._device = device_here()
        self._cgroup = cgroup_of_ours() / f"postcopy-test-{os.getpid()}"
        self._folder = folder
        self._log = folder / "systemd.log"
        self._lay_out(files, more or {})
        self._process: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def _lay_out(self, files: dict[str, str], more: dict[str, str]) -> None:
        (self._folder / "stage").mkdir()
        units = self._folder / "units"
        units.mkdir()
        for target in TARGETS:
            (units / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        for unit in UNITS.glob("*.service"):
            there = units / unit.name
            there.write_text(
                unit.read_text().replace("/usr/bin/", "/opt/bin/").replace("/etc/postcopy/", "/run/etc/postcopy/")
            )
            (units / f"{unit.name}.d").mkdir()
            told = f"[Service]\nStandardError=append:/srv/log\n{more.get(unit.name, '')}"
            (units / f"{unit.name}.d/test.conf").write_text(told)
        for name, text in files.items():
            (self._folder / name).write_text(text)
        python = Path(os.path.realpath(sys.executable)).relative_to(os.path.realpath(sys.base_prefix))
        packages = Path(next(one for one in sys.path if one.endswith("site-packages"))).relative_to(ROOT)
        (self._folder / "postcopy").write_text(PROGRAM.format(python=python, packages=packages))
        (self._folder / "postcopy").chmod(0o755)

    def __enter__(self) -> Self:
        script = BOOT.format(
            python=shlex.quote(os.path.realpath(sys.base_prefix)),
            root=shlex.quote(str(ROOT)),
            folder=shlex.quote(str(self._folder)),
            ip=shlex.quote(outside("ip")),
            major=os.major(self._device),
            minor=os.minor(self._device),
            systemd=SYSTEMD,
        )
        apart = ("--fork", "--kill-child", "--pid", "--mount", "--cgroup", "--net", "--uts", "--ipc", "--mount-proc")
        alone = [outside("unshare"), *apart, "sh", "-c", script]
        entered = f"echo $$ >{self._cgroup}/cgroup.procs && exec {shlex.join(alone)}"
        try:
            self._cgroup.mkdir()
        except OSError as refused:
            lacking(f"no cgroup can be made: {refused}")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(["sh", "-c", entered], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.pid = self._wait(self._first_process, "systemd does not start")
            self._wait(lambda: self.path("/run/systemd/private").exists(), "systemd does not listen")
            self._wait(lambda: self.systemctl("is-system-running").stdout.strip() in {"running", "degraded"}, "no boot")
        except BaseException:
            self.close()
            raise
        return self

    def _first_process(self) -> int | None:
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all that runs in there."""
        assert self._process is not None
        self._process.kill()  # and process 1 with it, and all with that
        self._process.wait()
        with contextlib.suppress(OSError):
            (self._cgroup / "cgroup.kill").write_text("1")
        for one in sorted(self._cgroup.rglob("*/"), reverse=True):
            until(lambda one=one: removed(one), "a cgroup stays")
        until(lambda: removed(self._cgroup), "a cgroup stays")

    def _wait(self, wanted: Any, complaint: str) -> Any:
        return until(wanted, lambda: f"{complaint}\n{self.log}", lives=self._process)

    @property
    def log(self) -> str:
        """What was said until systemd ran, and by the agents."""
        agents = self.path("/srv/log")
        return self._log.read_text(errors="replace") + (agents.read_text(errors="replace") if agents.exists() else "")

    def path(self, inside: str) -> Path:
        """Return where a file in there is reached from here."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def systemctl(self, *arguments: object, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Ask systemd."""
        done = say("nsenter", "-t", self.pid, "-m", "-p", "-C", "systemctl", *arguments)
        assert not check or done.returncode == 0, (done, self.log)
        return done

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Return some of a unit's properties."""
        done = self.systemctl("show", unit, "-p", ",".join(names))
        return dict(line.split("=", 1) for line in done.stdout.splitlines())

    def until(self, unit: str, **wanted: str) -> None:
        """Wait until a unit's properties are so."""
        self._wait(lambda: self.show(unit, *wanted) == wanted, f"{unit} is not {wanted}")

    def kill(self, unit: str, number: signal.Signals) -> None:
        """Send a signal to a unit's main process."""
        self.systemctl("kill", "--kill-who=main", f"--signal={number.name}", unit, check=True)

    def restarted(self, unit: str, times: int) -> None:
        """Wait until a unit that was started again so often, or more often on a busy host, runs."""

        def runs() -> bool:
            found = self.show(unit, "NRestarts", "SubState")
            return int(found["NRestarts"]) >= times and found["SubState"] == "running"

        self._wait(runs, f"{unit} is not started again")

    def left_of(self, unit: str) -> list[int]:
        """Return the processes of a unit."""
        with contextlib.suppress(FileNotFoundError):
            return [*map(int, (self._cgroup / "system.slice" / unit / "cgroup.procs").read_text().split())]
        return []


def until(wanted: Any, complaint: Any, lives: Any = None, deadline: float = DEADLINE) -> Any:
    end = time.monotonic() + deadline
    while not (found := wanted()):
        said = complaint() if callable(complaint) else complaint
        assert time.monotonic() < end, said
        assert lives is None or lives.poll() is None, said
        time.sleep(0.02)  # between two looks
    return found


def removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def device_here() -> int:
    """Return the number of the device that the units use; skipped without it, and where nobody may boot anything."""
    if not SYSTEMD.exists():
        lacking("systemd is not installed")
    if os.geteuid() != 0:
        lacking("only root may start a systemd")
    try:
        return DEVICE.stat().st_rdev
    except OSError as error:
        lacking(f"{DEVICE} is not there: {error}")


def cgroup_of_ours() -> Path:
    """Return the folder of this process's cgroup in the hierarchy that systemd needs; skipped where there is none."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    tops = [Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"]
    if not tops:
        lacking("cgroup2 is not mounted")
    ours = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    return tops[0] / ours.removeprefix("0::/")


def toml(section: str, **values: object) -> str:
    """Return a configuration of one section."""
    lines = [f"{name.replace('_', '-')} = {json.dumps(value)}" for name, value in values.items()]
    return "\n".join([f"[{section}]", *lines, ""])
