"""Outside VMMs that do all as documented: every byte of a snapshot, by real processes, from a real source over TCP."""

# ruff: noqa: SIM117 - daemons are there before a process and after it

from __future__ import annotations

import ctypes
import signal
from pathlib import Path

import pytest

from tests.agent.agents import Command, scrape
from tests.agent.agents import source as guest_source
from tests.outside.vmm import MIB, PAGE, Vmm, destination, let_go, snapshot, source

HUGE = 2 * MIB


@pytest.fixture
def file(tmp_path):
    return snapshot(tmp_path)


@pytest.fixture
def uffd_socket(tmp_path):
    return f"{tmp_path}/uffd.sock"


def reports(status):
    return [one["report"] for one in status["processes"] if one["report"]]


def none_left(status):
    return not status["processes"]


@pytest.mark.parametrize("push", [True, False], ids=["push", "asked for"])
def test_a_snapshot_is_restored_byte_for_byte(tmp_path, file, uffd_socket, push):
    with source(tmp_path, file) as here:
        there = destination(tmp_path, "--from", here.address, *([] if push else ["--no-push"]))
        with there, Vmm(uffd_socket, file=file) as vmm:
            assert vmm.call("wrong") == []
            (report,) = reports(there.until(reports))
            pages = report["pages"]
            assert pages["total"] == 2048 == pages["demand"] + pages["push"] + pages["zero"]
            assert pages["zero"] >= 512
            assert (pages["push"] > 0) is push
            assert report["memory"] == [{"type": "file", "page_size": PAGE, "size_bytes": 8 * MIB}]
            vmm.call("write", 0, 7)
            assert vmm.call("wrong") == [0]
            assert here.until(lambda now: now["ended_count"] == 1)["ended"]["outcome"] == "completed"


def test_only_what_is_touched_is_fetched_and_the_end_of_the_process_is_no_failure(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address, "--no-push") as there:
        with Vmm(uffd_socket, file=file) as vmm:
            for page in (0, 3, 9):
                assert vmm.call("read", page * PAGE) == file.read_bytes()[page * PAGE]
            assert there.until(lambda now: now["processes"][0]["pages"]["placed"] == 3)["processes"][0]["faults"] == 3
        status = there.until(none_left)
        assert (status["ended"]["outcome"], status["ended"]["exit_status"]) == ("completed", 0)
        assert status["ended"]["text"] == f"process {vmm.pid} has ended and needs nothing more"
        pages = status["report"]["pages"]
        assert (pages["demand"], pages["left"], pages["total"]) == (3, 2045, 2048)
        ended = here.until(lambda now: now["ended_count"] == 1)["ended"]
        assert ended["outcome"] == "completed"
        assert ended["text"] == "the destination needs nothing more: 2045 pages were never asked for"
        there.until_log(r"process \d+: it has ended")
        let_go(there)


def test_memory_is_served_although_who_handed_it_over_has_ended(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address, "--no-push") as there:
        with Vmm(uffd_socket, file=file, child=True) as vmm:
            there.until(lambda now: now["processes"] and now["processes"][0]["state"] == "postcopy-active")
            assert vmm.call("wrong") == []
        there.until(none_left)
        assert "has ended and needs nothing more" not in there.log


def test_huge_pages(tmp_path, file, uffd_socket, huge_pages):
    huge_pages("hugetlb-2M", 8)
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address) as there:
        with Vmm(uffd_socket, file=file, page_size=HUGE) as vmm:
            assert vmm.call("wrong") == []
            (report,) = reports(there.until(reports))
            assert report["memory"] == [{"type": "file", "page_size": HUGE, "size_bytes": 8 * MIB}]
            assert vmm.call("remove", 2 * HUGE, HUGE) == HUGE
            assert vmm.call("wrong", *range(2 * HUGE, 3 * HUGE, PAGE)) == []


def test_a_balloon_takes_pages_before_they_come_and_after(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address, "--no-push") as there:
        with Vmm(uffd_socket, file=file) as vmm:
            assert vmm.call("read", 0) == file.read_bytes()[0]
            vmm.call("remove", 0, 4 * PAGE)
            vmm.call("remove", 8 * MIB - PAGE, PAGE)
            there.until(lambda now: now["processes"][0]["removed"] == 4)
            gone = [0, PAGE, 2 * PAGE, 3 * PAGE, 8 * MIB - PAGE]
            assert vmm.call("wrong", *gone) == []
            (report,) = reports(there.until(reports))
            assert report["pages"]["demand"] == 2048 - 4 - 512 or report["pages"]["zero"] >= 516
            # all is here, and the balloon goes on: what it takes now reads zeros as well, without the source
            here.signal(signal.SIGKILL)
            vmm.call("remove", 6 * MIB, MIB)
            assert vmm.call("wrong", *gone, *range(6 * MIB, 7 * MIB, PAGE)) == []


def test_a_balloon_against_the_push(tmp_path, uffd_socket):
    file = snapshot(tmp_path, size=64 * MIB)
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address) as there:
        with Vmm(uffd_socket, ((64 * MIB, 0),), file=file) as vmm:
            gone = set()
            for offset in range(64 * MIB - PAGE, 32 * MIB, -37 * PAGE):
                vmm.call("remove", offset, PAGE)
                gone.add(offset)
            assert vmm.call("wrong", *gone) == []
            there.until(reports)


def test_several_mappings_with_offsets_of_their_own(tmp_path, file, uffd_socket):
    mappings = ((3 * MIB, 5 * MIB), (2 * MIB, 0), (MIB, 3 * MIB))
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address) as there:
        with Vmm(uffd_socket, mappings, file=file) as vmm:
            assert vmm.call("wrong") == []
            (report,) = reports(there.until(reports))
            assert report["pages"]["total"] == 6 * 256
            there.until_log(r"handed 6 MiB in 3 mappings over")


def test_every_way_in_which_firecracker_has_told_the_page_size(tmp_path, file, uffd_socket):
    ways = (
        (["page_size", "page_size_kib"], PAGE),  # both are there now, and both are bytes
        (["page_size"], PAGE),
        (["page_size_kib"], PAGE),  # bytes by the name of KiB, as it began
        (["page_size_kib"], 4),  # by its name
        ([], 0),  # before there were huge pages
    )
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address):
        for names, told in ways:
            with Vmm(uffd_socket, file=file, names=names, page_size_told=told) as vmm:
                assert vmm.call("wrong") == []


def test_many_processes_at_once_and_one_after_the_other(tmp_path, file, uffd_socket):
    with (
        source(tmp_path, file, "--metrics", "127.0.0.1:0") as here,
        destination(tmp_path, "--from", here.address, "--metrics", "127.0.0.1:0") as there,
    ):
        for count in (4, 1, 3):
            vmms = [Vmm(uffd_socket, file=file) for _ in range(count)]
            for vmm in vmms:
                vmm.ask("wrong")
            for vmm in vmms:
                assert vmm.answer() == []
            there.until(lambda now, count=count: len(reports(now)) == count)
            for vmm in vmms:
                with vmm:
                    pass
            there.until(none_left)
        assert here.until(lambda now: now["ended_count"] == 8)["destinations"] == []
        let_go(there)
        for daemon, role in ((here, "source"), (there, "destination")):
            url = daemon.until_log(r"http://\S+/metrics")[0]
            told = scrape(url)
            ended = [value for name, value in told.items() if name.startswith("postcopy_migrations_total")]
            assert sum(ended) == 8
            way = "sent" if role == "source" else "received"
            paths = ("demand", "push", "zero", "duplicate")
            *moved, again = (told[f'postcopy_pages_total{{direction="{way}",path="{path}"}}'] for path in paths)
            assert sum(moved) - again * (role == "source") == 8 * 2048
            assert told["postcopy_remaining_bytes"] == 0
        assert told["postcopy_fault_latency_seconds_count"] > 0


@pytest.mark.parametrize("page_size", [PAGE, HUGE])
def test_memory_whose_file_is_offered_is_filled_through_it(tmp_path, file, uffd_socket, huge_pages, page_size):
    huge_pages("hugetlb-2M", 8)
    mappings = ((4 * MIB, 4 * MIB), (4 * MIB, 0))
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address, "--no-push") as there:
        with Vmm(uffd_socket, mappings, file=file, shared=True, page_size=page_size) as vmm:
            assert vmm.call("read", 0) == file.read_bytes()[0]
            vmm.call("remove", 6 * MIB, HUGE)
            gone = range(6 * MIB, 6 * MIB + HUGE, PAGE)
            assert vmm.call("wrong", *gone) == []
            (report,) = reports(there.until(reports))
            assert report["mode"] == "minor"
            # of what was filled the process itself loses a mapping and finds it again in the file
            vmm.call("remove", 4 * MIB, HUGE)
            assert vmm.call("wrong", *gone, *range(4 * MIB, 4 * MIB + HUGE, PAGE)) == []
        there.until(none_left)
        let_go(there)


def test_a_mapping_in_pieces_is_one_all_the_same(tmp_path, file, uffd_socket):
    with source(tmp_path, file) as here, destination(tmp_path, "--from", here.address):
        for part in ((3 * MIB, PAGE), (0, PAGE), (8 * MIB - PAGE, PAGE)):
            with Vmm(uffd_socket, file=file, split=part) as vmm:
                assert vmm.call("wrong") == []


def test_a_file_of_which_nobody_may_see_where_it_is_mapped_is_not_used(tmp_path, file, uffd_socket):
    """The agent may trace nobody here; as root it may look at everybody."""
    with (
        source(tmp_path, file) as here,
        destination(tmp_path, "--from", here.address, preexec_fn=trace_nobody) as there,
    ):
        with Vmm(uffd_socket, file=file, shared=True, hidden=True) as vmm:
            there.until_log(rf"process {vmm.pid}: what it has mapped is not to be seen: .*; so its pages are copied")
            assert vmm.call("wrong") == []
            (report,) = reports(there.until(reports))
            assert report["mode"] == "missing"
        there.until(none_left)
        let_go(there)


def trace_nobody():
    """Have a daemon-to-be without the right to trace other processes: dropped from its bounding set."""
    libc = ctypes.CDLL(None, use_errno=True)
    PR_CAPBSET_DROP, CAP_SYS_PTRACE = 24, 19  # noqa: N806 - as the kernel has it
    assert libc.prctl(PR_CAPBSET_DROP, CAP_SYS_PTRACE, 0, 0, 0) == 0


def test_a_guest_of_ours_moves_into_a_process_that_waits(tmp_path, uffd_socket):
    """A source that dials, as ever: what is served is the process's memory, by what the guest had written."""
    with (
        guest_source(tmp_path, "--memory", "shmem:8MiB", "--steps", "3000") as here,
        destination(tmp_path) as there,
    ):
        here.until(lambda now: now["guest"]["steps"] == [3000, 3000])
        arguments = ("migrate", "--admin", here.admin, there.address, "--json")
        with Command(*arguments) as early:
            ended = early.result()
            assert (ended.status, ended.json["owner"]) == (4, "source")
            assert "no process waits here that has handed its memory over" in ended.json["error"]
        with Vmm(uffd_socket, ((4 * MIB, 0),)) as small:
            there.until(lambda now: now["waiting"] == 1)
            with Command(*arguments) as unfit:
                assert "region 0 has 8388608 bytes" in unfit.result().json["error"]
            there.until(lambda now: now["waiting"] == 1)
        there.until(lambda now: now["waiting"] == 0)
        with Vmm(uffd_socket) as vmm:
            there.until(lambda now: now["waiting"] == 1)
            with Command(*arguments) as moving:
                report = moving.result(30).json
            assert report["outcome"] == "completed"
            assert report["pages"]["total"] == 2048
            assert vmm.call("filled") == 2048 - report["pages"]["zero"]
            assert small.process.poll() is not None


def test_a_source_may_limit_its_push(tmp_path, uffd_socket):
    file = snapshot(tmp_path, size=64 * MIB)
    with source(tmp_path, file, "--max-postcopy-bandwidth", "1MiB/s") as here:
        with destination(tmp_path, "--from", here.address) as there, Vmm(uffd_socket, ((64 * MIB, 0),), file=file):
            there.until(lambda now: now["processes"] and now["processes"][0]["pages"]["placed"] > 0)
            assert not reports(there.status())
            assert here.ask("set", rate=0)["state"] == "postcopy-active"
            there.until(reports)


def test_the_socket_is_for_its_owner_alone(tmp_path, file, uffd_socket):
    with destination(tmp_path, "--from", "tcp:127.0.0.1:1"):
        assert Path(uffd_socket).stat().st_mode & 0o777 == 0o600
