"""The units under a systemd that runs: started, watched, killed, started again, stopped. Nothing of it is played."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.admin import ask
from postcopy.errors import PostcopyError
from postcopy.link.address import UnixAddress
from tests.chaos.pair import Migration
from tests.deploy import booted
from tests.deploy.booted import Booted, toml, until
from tests.outside.vmm import PAGE, Vmm, snapshot

SOURCE, DESTINATION = "postcopy-source.service", "postcopy-destination.service"
RESUME = "postcopy-resume@source.service"
ADMIN = "/run/postcopy/{}/admin.sock"
KEEPER = "/run/postcopy/source/keeper.sock"
FREE = {"ActiveState": "inactive", "Result": "success"}


class Agent:
    """A role whose unit runs in there; asked over its admin socket, as from a command."""

    def __init__(self, systemd: Booted, role: str) -> None:
        self.systemd = systemd
        self.admin = f"unix:{systemd.path(ADMIN.format(role))}"

    @property
    def log(self) -> str:
        return self.systemd.log

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        return asyncio.run(ask(UnixAddress(self.admin.removeprefix("unix:")), command, arguments))

    def status(self) -> dict[str, Any]:
        return self.ask("status")

    def until(self, wanted: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            try:
                now = self.status()
            except PostcopyError:  # nobody is there for a moment
                return None
            return now if wanted(now) else None

        found: dict[str, Any] = until(look, lambda: self.log)
        return found


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Callable[..., Booted]]:
    """A systemd with these configurations, which leaves this host as it was."""
    before = of_this_host()
    yield lambda more=None, **files: Booted(tmp_path, {f"{role}.toml": text for role, text in files.items()}, more)
    assert of_this_host() == before


def of_this_host() -> dict[str, Any]:
    """Return what a systemd that boots sets or leaves behind where it can, by where it is."""
    kernel = ("fs/file-max", "fs/nr_open", "net/unix/max_dgram_qlen", "kernel/hostname")
    files = [Path("/proc/sys") / name for name in kernel] + [Path("/etc/machine-id")]
    found: dict[str, Any] = {str(file): file.read_text() if file.exists() else None for file in files}
    for place in ("/tmp", "/var/tmp"):  # those of our units: others come and go
        found[place] = sorted(one.name for one in Path(place).glob("systemd-private-*-postcopy-*"))
    return found


@pytest.mark.parametrize(
    ("where", "name", "found"),
    [(os, "geteuid", lambda: 1000), (booted, "SYSTEMD", Path("/none")), (booted, "DEVICE", Path("/none"))],
)
def test_what_a_host_lacks_is_said_and_leaves_nothing(
    where: Any, name: str, found: Any, boot: Callable[..., Booted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(where, name, found)
    with pytest.raises(pytest.skip.Exception, match=r"systemd|/none"), boot():
        pass
    assert not (booted.cgroup_of_ours() / f"postcopy-test-{os.getpid()}").exists()


def source(**values: Any) -> str:
    settings = {
        "memory": ["shmem:8MiB"], "workload": "random", "steps_per_second": 500,
        "admin": f"unix:{ADMIN.format('source')}", "keeper": f"unix:{KEEPER}",
    }  # fmt: skip
    return toml("source", **(settings | values))


def destination(**values: Any) -> str:
    settings = {"listen": "tcp:127.0.0.1:0", "admin": f"unix:{ADMIN.format('destination')}"}
    return toml("destination", **(settings | values))


def test_a_guest_goes_from_unit_to_unit_and_outlives_its_source_that_is_killed(boot: Callable[..., Booted]) -> None:
    with boot(source=source(), destination=destination()) as systemd:
        systemd.systemctl("start", DESTINATION, SOURCE, check=True)  # returns once both have said that they are ready
        assert systemd.show(SOURCE, "SubState") == {"SubState": "running"}
        here, there = Agent(systemd, "source"), Agent(systemd, "destination")
        moving = Migration(here, there.status()["address"], push=False)
        there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] >= 5)
        systemd.kill(SOURCE, signal.SIGKILL)
        assert moving.result() == 6  # the keeper is out of sight of who asks from outside
        systemd.until(RESUME, ActiveState="active", SubState="running")
        there.until(lambda now: now["state"] == "postcopy-active" and now["reconnects"] == 1)
        systemd.kill(RESUME, signal.SIGKILL)  # and once more
        there.until(lambda now: now["state"] == "postcopy-active" and now["reconnects"] == 2)
        here.ask("set", push=True)
        there.until(lambda now: now["state"] == "completed")
        assert there.ask("check")["pages_mismatched"] == 0
        systemd.until(RESUME, **FREE)
        nothing_left(systemd)  # neither has its keeper anything left to do
        systemd.systemctl("stop", DESTINATION, check=True)
        assert systemd.show(DESTINATION, *FREE) == FREE
        assert "this agent owns the guest, which ends with it" in systemd.log
        assert "Traceback" not in systemd.log


def cannot_change_the_kernel(systemd: Booted) -> None:
    for setting in ("fs/file-max", "net/unix/max_dgram_qlen", "kernel/hostname"):
        with pytest.raises(OSError, match="Read-only"):
            systemd.path(f"/proc/sys/{setting}").open("r+")


def nothing_left(systemd: Booted) -> None:
    """Wait for the end of every keeper: it is nobody's to end but by itself."""
    until(lambda: not systemd.left_of(SOURCE) + systemd.left_of(RESUME), "a keeper stays")
    until(lambda: not systemd.path(KEEPER).exists(), "a keeper's socket stays")


def test_what_is_stopped_leaves_nothing(boot: Callable[..., Booted]) -> None:
    asked = "ConditionTimestampMonotonic"
    with boot(source=source()) as systemd:
        cannot_change_the_kernel(systemd)
        systemd.systemctl("start", SOURCE, check=True)
        assert len(systemd.left_of(SOURCE)) == 2
        systemd.systemctl("stop", SOURCE, check=True)
        assert systemd.show(SOURCE, *FREE) == FREE
        nothing_left(systemd)
        assert [*systemd.path("/run/postcopy/source").iterdir()] == []
        assert systemd.show(RESUME, "ActiveState") == {"ActiveState": "inactive"}
        systemd.systemctl("start", SOURCE, check=True)
        systemd.kill(SOURCE, signal.SIGKILL)  # a guest that has not left ends with it, and nobody goes on
        systemd.until(SOURCE, ActiveState="failed")
        nothing_left(systemd)
        # it was asked for; had it been quicker than the keeper's end it would have found nothing to go on with
        until(lambda: systemd.show(RESUME, asked) != {asked: "0"}, "nobody asked for it")
        systemd.until(RESUME, **FREE)
        assert "Traceback" not in systemd.log


def test_a_keeper_that_ends_as_it_is_asked_leaves_no_unit_that_failed(boot: Callable[..., Booted]) -> None:
    with boot(source=source()) as systemd:
        place = systemd.path(KEEPER)
        systemd.systemctl("start", SOURCE, check=True)
        systemd.systemctl("stop", SOURCE, check=True)
        nothing_left(systemd)
        with socket.socket(socket.AF_UNIX) as keeper:
            keeper.bind(str(place))
            place.chmod(0o666)
            keeper.listen()
            systemd.systemctl("start", "--no-block", RESUME, check=True)
            assert select.select([keeper], [], [], 30)[0], systemd.log
            place.unlink()
        until(lambda: "no keeper is there" in systemd.log, "it says nothing")
        systemd.until(RESUME, **FREE)  # one that failed stays so; one that did not is forgotten, with its status


def test_a_destination_that_is_killed_or_hangs_is_started_again_with_its_processes(
    boot: Callable[..., Booted], tmp_path: Path
) -> None:
    """The descriptor store, and the watchdog."""
    file = snapshot(tmp_path)
    handover = f"unix:{ADMIN.format('destination').replace('admin', 'uffd')}"
    serving = toml(
        "source", memory=["file:/srv/memory"], admin=f"unix:{ADMIN.format('source')}", listen="tcp:127.0.0.1:0"
    )
    watched = {DESTINATION: "WatchdogSec=3\nRestartSec=0\n"}
    with boot(watched, source=serving, destination="") as systemd:
        systemd.path("/srv/memory").write_bytes(file.read_bytes())
        systemd.path("/srv/memory").chmod(0o644)
        systemd.systemctl("start", SOURCE, check=True)
        fetching = toml(
            "destination", handover=handover, keep=True, no_push=True, admin=f"unix:{ADMIN.format('destination')}",
            **{"from": Agent(systemd, "source").status()["address"]},
        )  # fmt: skip
        systemd.path("/run/etc/postcopy/destination.toml").write_text(fetching)
        systemd.systemctl("start", DESTINATION, check=True)
        there = Agent(systemd, "destination")
        with Vmm(systemd.path(handover.removeprefix("unix:")), file=file) as vmm:
            assert vmm.call("read", 0) == file.read_bytes()[0]
            systemd.until(DESTINATION, NFileDescriptorStore="3")
            systemd.kill(DESTINATION, signal.SIGKILL)
            assert vmm.call("read", 5 * PAGE) == file.read_bytes()[5 * PAGE]
            systemd.restarted(DESTINATION, 1)
            first = there.until(lambda now: now["processes"])["pid"]
            systemd.kill(DESTINATION, signal.SIGSTOP)  # its loop goes round no more
            vmm.ask("read", 9 * PAGE)
            systemd.restarted(DESTINATION, 2)
            assert vmm.answer() == file.read_bytes()[9 * PAGE]
            assert there.until(lambda now: now["processes"])["pid"] != first
            assert vmm.call("wrong") == []
        systemd.until(DESTINATION, NFileDescriptorStore="0")
