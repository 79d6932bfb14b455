"""An agent that is killed and started again: its processes wait and then go on, and no byte of theirs is another."""

# ruff: noqa: SIM117 - daemons are there before a process and after it

from __future__ import annotations

import os
import signal
import struct
from contextlib import ExitStack
from pathlib import Path

import msgpack
import pytest

from tests.agent.agents import Command, run
from tests.agent.agents import source as guest_source
from tests.certificates import directory
from tests.chaos.proxy import Proxy, upstream_of
from tests.outside.supervisor import Supervisor
from tests.outside.test_ends import none_left, placed, until_stopped
from tests.outside.vmm import MIB, PAGE, Vmm, foreign_descriptors, let_go, snapshot, source


@pytest.fixture
def file(tmp_path):
    return snapshot(tmp_path)


@pytest.fixture
def uffd_socket(tmp_path):
    return f"{tmp_path}/uffd.sock"


@pytest.fixture
def systemd(tmp_path):
    with Supervisor(tmp_path) as supervisor:
        yield supervisor


def kill(daemon):
    daemon.signal(signal.SIGKILL)
    assert daemon.wait() == -signal.SIGKILL


def test_a_fault_in_the_hands_of_a_killed_agent_is_served_by_the_next_one(tmp_path, file, uffd_socket, systemd):
    """The kernel tells of a fault once: whoever waits has to be woken, to fault again."""
    said = ("--no-push", "--from")
    with source(tmp_path, file) as here:
        first = systemd.start(tmp_path, *said, here.address)
        with first, Vmm(uffd_socket, file=file) as vmm:
            assert vmm.call("read", 0) == file.read_bytes()[0]
            vmm.call("write", 1, 7)
            assert vmm.call("read", PAGE) == file.read_bytes()[PAGE]
            for page in (1, 2, 9):  # one that had come, and two that had not
                vmm.call("remove", page * PAGE, PAGE)
            first.until(lambda now: now["processes"][0]["removed"] == 2)
            here.signal(signal.SIGSTOP)
            until_stopped(here)
            vmm.ask("read", 5 * PAGE)
            first.until(lambda now: now["processes"][0]["faults"] == 3)
            kill(first)
            here.signal(signal.SIGCONT)
            with systemd.start(tmp_path, *said, here.address) as second:
                assert vmm.answer() == file.read_bytes()[5 * PAGE]
                second.until_log(rf"process {vmm.pid} is served again, with 4 pages that are here")
                gone = [PAGE, 2 * PAGE, 9 * PAGE]
                assert vmm.call("read", 1) == 7
                vmm.call("write", 1, file.read_bytes()[1])
                assert vmm.call("wrong", *gone) == []
                report = second.until(lambda now: now["processes"][0]["report"])["processes"][0]["report"]
                pages = report["pages"]
                assert pages["kept"] == 4
                assert pages["kept"] + pages["demand"] + pages["zero"] == 2048
                assert here.until(lambda now: now["ended_count"] == 2)["ended"]["outcome"] == "completed"
                # and once all is here: what is given back from now on reads zeros
                kill(second)
                with systemd.start(tmp_path, *said, here.address) as third:
                    third.until_log(rf"process {vmm.pid} is served again, with 2048 pages that are here")
                    vmm.call("remove", 7 * PAGE, PAGE)
                    assert vmm.call("wrong", *gone, 7 * PAGE) == []
                    vmm.process.kill()
                    third.until(none_left)
                    third.until(lambda _now: not systemd.kept and not foreign_descriptors(third))


def test_an_agent_killed_in_the_middle_of_a_push(tmp_path, uffd_socket, systemd):
    """Encrypted, as between two hosts; whoever is started again has to be believed anew."""
    file, tls = snapshot(tmp_path, size=64 * MIB), ("--tls-dir", directory(tmp_path / "tls"))
    with source(tmp_path, file, "--max-postcopy-bandwidth", "20MiB/s", *tls) as here, ExitStack() as agents:
        there = agents.enter_context(systemd.start(tmp_path, "--from", here.address, *tls))
        with (
            Vmm(uffd_socket, ((32 * MIB, 32 * MIB), (32 * MIB, 0)), file=file) as vmm,
            Vmm(uffd_socket, file=file, shared=True) as other,
        ):
            assert other.call("wrong") == []
            for count in (1000, 3000):
                there.until(placed(count))
                kill(there)
                there = agents.enter_context(systemd.start(tmp_path, "--from", here.address, *tls))
            here.ask("set", rate=0)
            assert vmm.call("wrong") == other.call("wrong") == []
            there.until(lambda now: all(one["report"] for one in now["processes"]))


def test_a_process_that_ends_without_its_agent_is_forgotten(tmp_path, file, uffd_socket, systemd):
    with source(tmp_path, file) as here:
        with systemd.start(tmp_path, "--no-push", "--from", here.address) as first:
            with Vmm(uffd_socket, file=file) as vmm:
                assert vmm.call("read", 0) == file.read_bytes()[0]
                first.until(lambda _now: [len(kept) for kept in systemd.kept.values()] == [3])
                kill(first)
            with systemd.start(tmp_path, "--no-push", "--from", here.address) as second:
                second.until_log(r"process \d+ has ended meanwhile|an agent before this one served is gone")
                second.until(lambda _now: not systemd.kept and not foreign_descriptors(second))


def test_a_source_comes_back_to_an_agent_that_was_started_again(tmp_path, uffd_socket, systemd):
    """Encrypted, too."""
    tls = ("--tls-dir", directory(tmp_path / "tls"))
    with guest_source(tmp_path, "--memory", "shmem:8MiB", "--steps", "3000", *tls) as here:
        here.until(lambda now: now["guest"]["steps"] == [3000, 3000])
        with systemd.start(tmp_path, *tls) as first, Vmm(uffd_socket) as vmm:
            first.until(lambda now: now["waiting"] == 1)
            with Command("migrate", "--admin", here.admin, first.address, "--json", "--no-push") as moving:
                bytes_before = [vmm.call("read", page * PAGE) for page in range(0, 600, 3)]
                vmm.call("write", 0, 77)
                first.until(placed(200))
                here.signal(signal.SIGSTOP)
                until_stopped(here)
                vmm.ask("read", 1000 * PAGE)
                first.until(lambda now: now["processes"][0]["faults"] == 201)
                kill(first)
                here.signal(signal.SIGCONT)
                with systemd.start(tmp_path, "--listen", first.address, *tls) as second:
                    vmm.answer()
                    assert vmm.call("read", 0) == 77
                    vmm.call("write", 0, bytes_before[0])
                    assert [vmm.call("read", page * PAGE) for page in range(0, 600, 3)] == bytes_before
                    here.until(lambda now: now["reconnects"] == 1)
                    here.ask("set", push=True)
                    report = moving.result(30).json
                    assert report["outcome"] == "completed"
                    assert report["pages"]["kept"] == 200
                    assert vmm.call("filled") == 2048 - report["pages"]["zero"]
                    second.until(lambda now: now["processes"][0]["state"] == "completed")


def held(status):
    return [one["state"] for one in status["processes"] if (one["paused"] or {}).get("held")] == ["postcopy-paused"]


def test_a_pause_of_what_is_fetched_outlives_the_agent(tmp_path, file, uffd_socket, systemd):
    said = ("--no-push", "--from")
    with source(tmp_path, file) as here, ExitStack() as agents:
        there = agents.enter_context(systemd.start(tmp_path, *said, here.address))
        with Vmm(uffd_socket, file=file) as vmm:
            assert vmm.call("read", 0) == file.read_bytes()[0]
            assert run("pause", "--admin", there.admin).status == 0
            kill(there)
            there = agents.enter_context(systemd.start(tmp_path, *said, here.address))
            there.until_log(rf"process {vmm.pid}: somebody paused it: it waits for postcopy resume")
            vmm.ask("read", PAGE)
            with Vmm(uffd_socket, file=file) as other:  # dialled for later than the first one would be
                assert other.call("read", 0) == file.read_bytes()[0]
            there.until(lambda now: len(now["processes"]) == 1)
            assert held(there.status())
            assert here.until(lambda now: now["destinations"] == [])
            resumed = run("resume", "--admin", there.admin)
            assert resumed.status == 0, resumed.err
            assert vmm.answer() == file.read_bytes()[PAGE]
            kill(there)
            agents.enter_context(systemd.start(tmp_path, *said, here.address))
            assert vmm.call("wrong") == []  # for whoever is resumed nobody has to ask again


def test_a_pause_of_what_a_source_brings_outlives_the_agent(tmp_path, uffd_socket, systemd):
    with guest_source(tmp_path, "--memory", "shmem:8MiB", "--steps", "3000") as here, ExitStack() as agents:
        here.until(lambda now: now["guest"]["steps"] == [3000, 3000])
        there = agents.enter_context(systemd.start(tmp_path))
        with Vmm(uffd_socket) as vmm:
            there.until(lambda now: now["waiting"] == 1)
            with Command("migrate", "--admin", here.admin, there.address, "--json", "--no-push") as moving:
                vmm.call("read", 0)
                assert run("pause", "--admin", there.admin).status == 0
                kill(there)
                here.until(lambda now: now["paused"] and not is_held(now))
                there = agents.enter_context(systemd.start(tmp_path, "--listen", there.address))
                here.until(is_held)
                assert held(there.status())
                resumed = run("resume", "--admin", there.admin)
                assert resumed.status == 0, resumed.err
                here.ask("set", push=True)
                report = moving.result(30).json
            assert report["outcome"] == "completed"
            assert vmm.call("filled") == 2048 - report["pages"]["zero"]


def is_held(status):
    """Whether a source was sent away because somebody paused at its destination."""
    return "held at the destination" in (status["paused"] or {}).get("text", "")


def spoil(systemd, page):
    """Have the file that is kept say of a page what nobody says of one."""
    for one in systemd.descriptors:
        if "memfd" in str(Path(f"/proc/self/fd/{one}").readlink()):
            os.pwrite(one, b"\xff", (64 << 10) + page)


@pytest.mark.parametrize("dialled", [True, False])
def test_what_was_kept_and_makes_no_sense_ends_the_process_and_no_agent(tmp_path, uffd_socket, systemd, dialled):
    with guest_source(tmp_path, "--memory", "shmem:8MiB", "--steps", "3000") as here, ExitStack() as others:
        here.until(lambda now: now["guest"]["steps"] == [3000, 3000])
        said = [] if dialled else ["--from", "tcp:127.0.0.1:1", "--no-push"]
        if not dialled:
            (tmp_path / "of").mkdir()
            said[1] = others.enter_context(source(tmp_path / "of", snapshot(tmp_path))).address
        with systemd.start(tmp_path, *said) as first, Vmm(uffd_socket) as vmm:
            if dialled:
                first.until(lambda now: now["waiting"] == 1)
                others.enter_context(Command("migrate", "--admin", here.admin, first.address, "--no-push"))
            vmm.call("read", 0)
            kill(first)
            spoil(systemd, 1000)
            with systemd.start(tmp_path, *said) as second:
                second.until_log(rf"process {vmm.pid}: .*; \d+ pages are poisoned")
                vmm.call("read", 0)
                vmm.ask("read", PAGE)
                assert vmm.ends_with() == -signal.SIGBUS
                second.until(lambda now: none_left(now) and not systemd.kept)


def rewrite(systemd, change):
    """Have the record say what `change` makes of it, or nothing."""
    for one in systemd.descriptors:
        if "memfd" in str(Path(f"/proc/self/fd/{one}").readlink()):
            (length,) = struct.unpack("<I", os.pread(one, 4, 0))
            said = change(msgpack.unpackb(os.pread(one, length, 4)))
            record = msgpack.packb(said) if said else b""
            os.pwrite(one, struct.pack("<I", len(record)) + record, 0)


@pytest.mark.parametrize("said", [{"version": 2}, {"mappings": [(4096, 8 * MIB, 0, 0)]}, None])
def test_a_record_that_makes_no_sense_keeps_no_agent_from_starting(tmp_path, uffd_socket, systemd, said):
    with systemd.start(tmp_path) as first, Vmm(uffd_socket) as vmm:
        first.until(lambda now: now["waiting"] == 1)
        kill(first)
        rewrite(systemd, lambda record: said and record | said)
        with systemd.start(tmp_path) as second:
            second.until_log("a process is not served any more: what was kept of a process")
            if said and "version" in said:  # where the memory is, is said
                vmm.ask("read", 0)
                assert vmm.ends_with() == -signal.SIGBUS
                second.until(lambda _now: not systemd.kept)
            else:
                second.until_log("waits for ever for its pages")
                assert systemd.kept  # or the process would read zeros
            let_go(second)


def test_memory_that_its_source_named_by_nothing_is_fetched_on_from_nobody(tmp_path, file, uffd_socket, systemd):
    with source(tmp_path, file) as here:
        with systemd.start(tmp_path, "--no-push", "--from", here.address) as first, Vmm(uffd_socket, file=file) as vmm:
            assert vmm.call("read", 0) == file.read_bytes()[0]
            kill(first)
            rewrite(systemd, lambda record: record | {"migration": [*record["migration"][:-1], b"\x80"]})
            with systemd.start(tmp_path, "--no-push", "--from", here.address) as second:
                second.until_log(rf"process {vmm.pid}: its source named no memory, .*; 2047 pages are poisoned")
                assert vmm.call("read", 0) == file.read_bytes()[0]
                vmm.ask("read", PAGE)
                assert vmm.ends_with() == -signal.SIGBUS
                second.until(lambda now: none_left(now) and not systemd.kept)


def test_a_source_comes_back_after_its_connections_broke(tmp_path, uffd_socket, systemd):
    with guest_source(tmp_path, "--memory", "shmem:8MiB", "--steps", "3000") as here:
        here.until(lambda now: now["guest"]["steps"] == [3000, 3000])
        with (
            systemd.start(tmp_path) as there,
            Vmm(uffd_socket) as vmm,
            Proxy(upstream_of(there.address)) as proxy,
        ):
            there.until(lambda now: now["waiting"] == 1)
            with Command("migrate", "--admin", here.admin, proxy.address, "--json", "--no-push") as moving:
                vmm.call("read", 0)
                proxy.cut()
                here.until(lambda now: now["reconnects"] == 1)
                vmm.call("read", PAGE)
                here.ask("set", push=True)
                report = moving.result(30).json
            assert report["outcome"] == "completed"
            assert "kept" not in report["pages"]
            assert vmm.call("filled") == 2048 - report["pages"]["zero"]


def test_a_source_that_stays_away_is_given_up_by_hand(tmp_path, uffd_socket, systemd):
    with guest_source(tmp_path, "--memory", "shmem:8MiB", "--steps", "3000") as here:
        here.until(lambda now: now["guest"]["steps"] == [3000, 3000])
        with systemd.start(tmp_path) as there, Vmm(uffd_socket) as vmm:
            there.until(lambda now: now["waiting"] == 1)
            with Command("migrate", "--admin", here.admin, there.address, "--no-push"):
                first = vmm.call("read", 0)
                here.signal(signal.SIGKILL)
                vmm.ask("read", PAGE)
                there.until(lambda now: now["processes"][0]["state"] == "postcopy-paused")
                there.ask("cancel", lost=True)
                there.until_log(r"2047 pages are poisoned")
                assert vmm.ends_with() == -signal.SIGBUS
                assert first >= 0
            there.until(none_left)


def test_a_process_that_ends_while_its_source_is_away_needs_nothing_more(tmp_path, uffd_socket, systemd):
    with guest_source(tmp_path, "--memory", "shmem:8MiB", "--steps", "3000") as here:
        here.until(lambda now: now["guest"]["steps"] == [3000, 3000])
        with systemd.start(tmp_path) as there, Vmm(uffd_socket) as vmm:
            there.until(lambda now: now["waiting"] == 1)
            with Command("migrate", "--admin", here.admin, there.address, "--json", "--no-push") as moving:
                vmm.call("read", 0)
                here.signal(signal.SIGSTOP)
                there.until(lambda now: now["processes"][0]["state"] == "postcopy-paused")
                vmm.process.kill()
                ended = there.until(lambda now: none_left(now) and not systemd.kept)["ended"]
                assert (ended["outcome"], ended["text"]) == (
                    "completed", f"process {vmm.pid} has ended and needs nothing more"
                )  # fmt: skip
                here.signal(signal.SIGCONT)
                assert moving.result(30).json["pages"]["left"] == 2047  # the source is told when it comes back


def test_nobody_keeps_anything_without_a_supervisor(tmp_path):
    with Command(
        "destination", "--handover", f"unix:{tmp_path}/uffd.sock", "--keep", "--from", "tcp:127.0.0.1:1"
    ) as it:
        done = it.result(20)
        assert done.status == 2
        assert "nobody is here to keep descriptors" in done.one_line()
    assert not (tmp_path / "uffd.sock").exists()
