"""Memory that is fetched outlives its connections: cut, silent, held by hand, or with its source's agent killed."""

# ruff: noqa: SIM117 - daemons are there before a process and after it

from __future__ import annotations

import os
import re
import signal

import pytest

from postcopy.wire.preamble import Role
from tests.agent.agents import Command, run
from tests.agent.agents import source as guest_source
from tests.chaos.link import PUSH, URGENT
from tests.chaos.proxy import Proxy, upstream_of
from tests.outside.test_ends import none_left, placed
from tests.outside.vmm import MIB, PAGE, Vmm, destination, let_go, snapshot, source


@pytest.fixture
def file(tmp_path):
    return snapshot(tmp_path)


@pytest.fixture
def uffd_socket(tmp_path):
    return f"{tmp_path}/uffd.sock"


def all_are(state, count=1):
    return lambda now: [one["state"] for one in now["processes"]] == [state] * count


def reconnects(count):
    return lambda now: now["processes"][0]["reconnects"] >= count and all_are("postcopy-active")(now)


def waits_in_a_fault(there, vmm, page):
    """Have the process touch a page that does not come; return once the agent knows."""
    before = there.status()["processes"][0]["faults"]
    vmm.ask("read", page * PAGE)
    there.until(lambda now: now["processes"][0]["faults"] > before)


def test_each_connection_may_break_and_no_byte_is_another(tmp_path, uffd_socket):
    file = snapshot(tmp_path, size=32 * MIB)
    with (
        source(tmp_path, file, "--max-postcopy-bandwidth", "2MiB/s") as here,
        Proxy(upstream_of(here.address)) as proxy,
    ):
        with (
            destination(tmp_path, "--from", proxy.address) as there,
            Vmm(uffd_socket, ((32 * MIB, 0),), file=file) as vmm,
        ):
            there.until(placed(100))
            vmm.call("write", 5, 77)
            for number, cut in enumerate(((URGENT,), (PUSH,), (Role.FETCH,), ()), 1):
                proxy.cut(*cut, reset=number == 4)
                there.until(reconnects(number))
            here.ask("set", rate=0)
            assert vmm.call("read", 5) == 77  # nothing is placed twice
            vmm.call("write", 5, file.read_bytes()[5])
            report = there.until(lambda now: now["processes"][0]["report"])["processes"][0]["report"]
            pages = report["pages"]
            assert pages["demand"] + pages["push"] + pages["zero"] == pages["total"] == 8192
            assert vmm.call("wrong") == []
            there.until_log(f"process {vmm.pid}: resumed after a pause of")
            assert "poisoned" not in there.log
        ended = here.until(lambda now: now["destinations"] == [] and now["ended_count"] == 5)["ended"]
        assert ended["outcome"] == "completed"
        here.until_log("and may come back for them")


def test_silence_is_noticed_although_nobody_faults(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here, Proxy(upstream_of(here.address)) as proxy:
        with destination(tmp_path, "--from", proxy.address, "--no-push") as there, Vmm(uffd_socket, file=file) as vmm:
            assert vmm.call("read", 0) == file.read_bytes()[0]
            proxy.swallow(URGENT)  # while control goes on
            there.until_log("-> postcopy-paused")
            there.until(reconnects(1))
            assert vmm.call("wrong") == []


def test_a_source_that_is_started_again_goes_on_with_the_same_file_and_no_other(tmp_path, file, uffd_socket):
    (tmp_path / "other").mkdir()
    other = snapshot(tmp_path / "other")
    with source(tmp_path, file) as first:
        port = first.address.rpartition(":")[2]
        with destination(tmp_path, "--from", first.address, "--no-push") as there, Vmm(uffd_socket, file=file) as vmm:
            assert vmm.call("read", 0) == file.read_bytes()[0]
            first.signal(signal.SIGKILL)
            there.until(all_are("postcopy-paused"))
            waits_in_a_fault(there, vmm, 7)
            with source(tmp_path, other, "--listen", f"tcp:127.0.0.1:{port}") as wrong:
                there.until_log(r"paused still: the source there serves other memory than this was begun with")
                assert there.status()["processes"][0]["pages"]["placed"] == 1
                wrong.signal(signal.SIGTERM)
                assert wrong.wait() == 0
            with source(tmp_path, file, "--listen", f"tcp:127.0.0.1:{port}") as again:
                assert vmm.answer() == file.read_bytes()[7 * PAGE]
                again.signal(signal.SIGTERM)  # asked to end, it is not the end of anybody's memory either
                assert again.wait() == 5
            there.until(all_are("postcopy-paused"))
            assert "1 destinations lack pages of this snapshot" in again.log
            os.utime(file)  # as if it had been written to
            with source(tmp_path, file, "--listen", f"tcp:127.0.0.1:{port}") as changed:
                waits_in_a_fault(there, vmm, 9)
                there.until(lambda now: "other memory" in now["processes"][0]["paused"]["text"])
                there.ask("cancel", lost=True)
                assert vmm.ends_with() == -signal.SIGBUS
                there.until(none_left)
                assert changed.process.poll() is None


def test_by_hand_it_is_held_taken_elsewhere_and_given_up(tmp_path, file, uffd_socket):
    (tmp_path / "b").mkdir()
    with source(tmp_path, file) as here, source(tmp_path / "b", file) as elsewhere:
        with destination(tmp_path, "--from", here.address, "--no-push", "--give-up-after", "60") as there:
            with Vmm(uffd_socket, file=file) as vmm, Vmm(uffd_socket, file=file) as other:
                assert vmm.call("read", 0) == other.call("read", 0) == file.read_bytes()[0]
                refused = run("resume", "--admin", there.admin)
                assert (refused.status, refused.one_line()) == (
                    2, "postcopy: no migration can be resumed: none is paused"
                )  # fmt: skip
                assert run("pause", "--admin", there.admin, "--json").json["state"] == "postcopy-paused"
                assert all_are("postcopy-paused", 2)(status := there.status())
                assert all(one["paused"]["held"] for one in status["processes"])
                said = re.findall(
                    r"^paused +for .* by hand: somebody asked", run("status", "--admin", there.admin).out, re.MULTILINE
                )
                assert len(said) == 2
                here.until(lambda now: now["destinations"] == [])
                here.signal(signal.SIGKILL)
                assert vmm.call("read", 0) == file.read_bytes()[0]
                vmm.ask("read", 3 * PAGE)
                resumed = run("resume", "--admin", there.admin, "--to", elsewhere.address)
                assert (resumed.status, "postcopy-active" in resumed.out) == (0, True), resumed.err
                assert vmm.answer() == file.read_bytes()[3 * PAGE]
                assert vmm.call("wrong") == other.call("wrong") == []
                with Vmm(uffd_socket, file=file) as late:  # the former source is gone, so nobody else is sent there
                    assert late.call("wrong") == []
                refused = run("pause", "--admin", elsewhere.admin)
                assert refused.status == 2
                assert "whoever fetches from it (--from) dials" in refused.one_line()


def test_a_wrong_address_costs_an_attempt_and_no_more(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address, "--no-push") as there:
        with Vmm(uffd_socket, file=file) as vmm:
            assert vmm.call("read", 0) == file.read_bytes()[0]
            assert run("pause", "--admin", there.admin).status == 0
            assert run("resume", "--admin", there.admin, "--to", "tcp:127.0.0.1:1").status == 5
            with Vmm(uffd_socket, file=file) as late:  # nor is anybody else sent there
                assert late.call("read", 0) == file.read_bytes()[0]
            assert vmm.call("read", PAGE) == file.read_bytes()[PAGE]


def test_a_source_that_stays_away_too_long_is_given_up(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here:
        with destination(tmp_path, "--from", here.address, "--no-push", "--give-up-after", "0.5") as there:
            with Vmm(uffd_socket, file=file) as vmm:
                assert vmm.call("read", 0) == file.read_bytes()[0]
                here.signal(signal.SIGKILL)
                there.until_log(rf"process {vmm.pid}: lost after the switchover: .*; 2047 pages are poisoned")
                assert vmm.call("read", 0) == file.read_bytes()[0]
                vmm.ask("read", PAGE)
                assert vmm.ends_with() == -signal.SIGBUS


def test_a_process_that_is_given_up_and_lives_on_costs_nothing_more(tmp_path, uffd_socket):
    with guest_source(tmp_path, "--memory", "shmem:8MiB", "--steps", "3000") as here:
        here.until(lambda now: now["guest"]["steps"] == [3000, 3000])
        with destination(tmp_path) as there, Vmm(uffd_socket) as vmm:
            there.until(lambda now: now["waiting"] == 1)
            with Command("migrate", "--admin", here.admin, there.address, "--no-push"):
                vmm.call("read", 0)
                here.signal(signal.SIGKILL)
                there.until(all_are("postcopy-paused"))
                there.ask("cancel", lost=True)
                there.until_log(r"2047 pages are poisoned")
                there.until(lambda _now: not vmm.call("waits"))  # its connection is closed
                let_go(there)


def test_a_process_that_ends_or_gives_all_back_while_its_source_is_away_needs_nothing_more(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here:
        with destination(tmp_path, "--from", here.address, "--no-push") as there:
            with Vmm(uffd_socket, file=file) as vmm, Vmm(uffd_socket, file=file) as other:
                assert vmm.call("read", 0) == other.call("read", 0) == file.read_bytes()[0]
                here.signal(signal.SIGKILL)
                there.until(all_are("postcopy-paused", 2))
                vmm.call("remove", PAGE, 8 * MIB - PAGE)
                there.until(lambda now: now["processes"][0]["state"] == "completed")
                assert vmm.call("read", PAGE) == 0
                other.process.kill()
                ended = there.until(lambda now: len(now["processes"]) == 1)["ended"]
                assert (ended["outcome"], ended["text"]) == (
                    "completed", f"process {other.pid} has ended and needs nothing more"
                )  # fmt: skip
