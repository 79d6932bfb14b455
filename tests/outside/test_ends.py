"""Ends that nobody planned: of the process, of the source, of the file, of the destination's agent."""

# ruff: noqa: SIM117 - daemons are there before a process and after it

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.agent.agents import LOSS_SECONDS
from tests.outside.vmm import MIB, PAGE, Vmm, destination, let_go, snapshot, source


@pytest.fixture
def file(tmp_path):
    return snapshot(tmp_path)


@pytest.fixture
def uffd_socket(tmp_path):
    return f"{tmp_path}/uffd.sock"


def placed(count):
    return lambda now: now["processes"] and now["processes"][0]["pages"]["placed"] >= count


def until_stopped(daemon):
    """Wait until a signal that stops a process has stopped it: sending it does not."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{daemon.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.001)  # between two looks, not to force an order


def none_left(status):
    return not status["processes"]


def test_a_process_killed_in_the_middle_of_a_push(tmp_path, uffd_socket):
    file = snapshot(tmp_path, size=64 * MIB)
    with source(tmp_path, file, "--max-postcopy-bandwidth", "5MiB/s") as here:
        with destination(tmp_path, "--from", here.address) as there:
            with Vmm(uffd_socket, ((8 * MIB, 0),), file=file) as other:
                there.until(lambda now: now["processes"])
                with Vmm(uffd_socket, ((64 * MIB, 0),), file=file) as vmm:
                    there.until(lambda now: any(0 < one["pages"]["placed"] < 15000 for one in now["processes"][1:]))
                    vmm.process.kill()
                    there.until_log(rf"process {vmm.pid}: it has ended")
                assert there.until(lambda now: len(now["processes"]) == 1)["ended"]["exit_status"] == 0
                assert other.call("wrong") == []
            there.until(none_left)  # the agent's own end would be another one, for the source
        assert here.until(lambda now: now["destinations"] == [])["ended"]["outcome"] == "completed"
        assert here.process.poll() is None


def test_a_source_that_dies_and_is_given_up_leaves_a_clear_sigbus_and_no_zeros(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address, "--no-push") as there:
        with Vmm(uffd_socket, file=file) as vmm, Vmm(uffd_socket, file=file) as waiting:
            assert vmm.call("read", 0) == file.read_bytes()[0]
            vmm.call("remove", PAGE, PAGE)
            there.until(lambda now: sum(one["removed"] for one in now["processes"]) == 1)
            there.until(lambda now: [one["state"] for one in now["processes"]] == ["postcopy-active"] * 2)
            here.signal(signal.SIGSTOP)
            until_stopped(here)
            waiting.ask("read", 5 * PAGE)  # in the middle of a fault when its source dies
            there.until(lambda now: sum(one["faults"] for one in now["processes"]) == 2)
            here.signal(signal.SIGKILL)
            there.until(lambda now: [one["state"] for one in now["processes"]] == ["postcopy-paused"] * 2)
            there.ask("cancel", lost=True)
            there.until_log(rf"process {vmm.pid}: lost after the switchover: .*; 2046 pages are poisoned", LOSS_SECONDS)
            assert waiting.ends_with() == -signal.SIGBUS
            assert vmm.call("read", 0) == file.read_bytes()[0]
            assert vmm.call("read", PAGE) == 0
            vmm.ask("read", 2 * PAGE)
            assert vmm.ends_with() == -signal.SIGBUS
        ended = there.until(lambda now: none_left(now) and now["ended"])["ended"]
        assert ended["exit_status"] == 6
        let_go(there)
        assert there.process.poll() is None


def test_no_source_at_all(tmp_path, file, uffd_socket):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with destination(tmp_path, "--from", f"tcp:127.0.0.1:{port}") as there, Vmm(uffd_socket, file=file) as vmm:
        there.until_log(
            rf"process {vmm.pid}: cannot connect to tcp:127.0.0.1:{port}: Connection refused; 2048 pages are"
        )
        vmm.ask("read", 0)
        assert vmm.ends_with() == -signal.SIGBUS


def test_a_file_that_is_cut_short_kills_neither_agent_and_gives_no_zeros(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address, "--no-push") as there:
        with Vmm(uffd_socket, file=file) as vmm:
            assert vmm.call("read", 0) == file.read_bytes()[0]
            os.truncate(file, 4 * MIB)
            vmm.ask("read", 6 * MIB)
            assert vmm.ends_with() == -signal.SIGBUS
        here.until_log("the file behind the memory cannot be read: it has become shorter")
        os.truncate(file, 8 * MIB)
        with Vmm(uffd_socket, file=file) as again:  # all that was cut off is a hole now
            assert again.call("wrong") == []
        assert there.process.poll() is here.process.poll() is None


def test_the_destination_ends_with_a_process_whose_pages_are_all_there(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address) as there:
        with Vmm(uffd_socket, file=file) as vmm:
            there.until(lambda now: now["processes"] and now["processes"][0]["report"])
            there.signal(signal.SIGTERM)
            assert there.wait() == 0
            assert not Path(uffd_socket).exists()
            vmm.call("remove", 0, PAGE)
            assert vmm.call("wrong", 0) == []  # zeros that were never touched among them: nobody waits


def test_the_destination_ends_with_a_process_that_lacks_pages(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address, "--no-push") as there:
        with Vmm(uffd_socket, file=file) as vmm:
            assert vmm.call("read", PAGE) == file.read_bytes()[PAGE]
            there.signal(signal.SIGTERM)
            assert there.wait() == 6
            assert f"process {vmm.pid} loses 2047 pages" in there.log
            assert vmm.call("read", PAGE) == file.read_bytes()[PAGE]
            vmm.ask("read", 0)
            assert vmm.ends_with() == -signal.SIGBUS


def test_the_destination_ends_with_a_process_for_which_no_source_has_come(tmp_path, uffd_socket):
    with destination(tmp_path) as there, Vmm(uffd_socket) as vmm:
        there.until(lambda now: now["waiting"] == 1)
        vmm.ask("read", 0)
        there.signal(signal.SIGTERM)
        assert there.wait() == 6
        assert f"process {vmm.pid} loses 2048 pages" in there.log
        assert vmm.ends_with() == -signal.SIGBUS


@pytest.mark.parametrize("lacks", [True, False])
def test_the_source_ends_with_a_word_about_those_who_need_it(tmp_path, file, uffd_socket, lacks):
    with source(tmp_path, file) as here:
        with destination(tmp_path, "--from", here.address, "--no-push") as there, Vmm(uffd_socket, file=file) as vmm:
            there.until(lambda now: now["state"] == "postcopy-active" or now["processes"])
            here.until(lambda now: now["state"] == "postcopy-active")
            if not lacks:
                assert vmm.call("wrong") == []
                here.until(lambda now: now["destinations"] == [])
            here.signal(signal.SIGTERM)
            assert here.wait() == (5 if lacks else 0)
            assert ("1 destinations lack pages" in here.log) is lacks


def test_what_a_process_does_to_its_memory_is_its_own_business(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address, "--no-push") as there:
        with Vmm(uffd_socket, ((4 * MIB, 0), (4 * MIB, 4 * MIB)), file=file) as vmm:
            there.until(lambda now: now["state"] == "postcopy-active")
            assert vmm.call("unmap", 0, 4 * MIB) == 0
            assert vmm.call("close_uffd") == vmm.call("hang_up") == 0
            assert vmm.call("read", 5 * MIB) == file.read_bytes()[5 * MIB]
        there.until(none_left)
        let_go(there)


def test_strangers_at_the_source_s_port(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address):
        host, port = here.address.removeprefix("tcp:").split(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert stranger.recv(1) == b""
        here.until_log("not a postcopy connection: it begins with 'GET / HT'")
        with Vmm(uffd_socket, file=file) as vmm:
            assert vmm.call("wrong") == []
