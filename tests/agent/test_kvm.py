"""Guests of KVM through whole migrations between real daemons, checked to the last byte; and hosts without KVM."""

import signal
from pathlib import Path

import pytest

from agent.summary import status_rows
from postcopy.errors import HostError
from postcopy.guest.kvm.machine import check_host
from tests.lacking import lacking

from .agents import Command, destination, run, source
from .relay import open_files
from .test_memory_types import migrated, shape

MIB = 1 << 20
# A host on which /dev/kvm is something else.
WITHOUT_KVM = ("unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/kvm && exec "$@"', "sh")


@pytest.fixture(autouse=True)
def _kvm():
    try:
        check_host()
    except HostError as missing:
        lacking(str(missing))


@pytest.mark.parametrize(
    ("memory", "mode", "workload"),
    [
        ("shmem", "auto", "random"),
        ("shmem", "minor", "sequential"),
        ("anonymous", "auto", "increment"),
        ("anonymous", "move", "random"),
        ("hugetlb-2M", "auto", "stride"),
        ("hugetlb-2M", "missing", "increment"),
    ],
)
def test_every_byte_arrives(memory, mode, workload, huge_pages):
    if memory == "hugetlb-2M":
        huge_pages(memory, 32)
    report = migrated("--guest", "kvm", "--memory", memory, "--size", "32MiB", "--mode", mode, "--workload", workload)
    assert report["mode"] == mode
    assert report["pages"]["demand"] > 0
    assert report["stall_seconds"]["count"] > 0
    assert 0 < report["downtime_seconds"] < report["total_seconds"]
    assert report["details"]["downtime_is_exact"]


def test_several_regions_and_vcpus_fetch_their_pages_themselves(huge_pages):
    huge_pages("hugetlb-2M", 8)
    memory = ["hugetlb-2M:4MiB", "shmem:6MiB", "anonymous:3MiB"]
    report = migrated(
        *("--guest", "kvm", "--vcpus", "3", "--no-push", "--seconds", "1.5"),
        *(word for one in memory for word in ("--memory", one)),
    )
    assert shape(report) == [("hugetlb-2M", 2 * MIB, 4 * MIB), ("shmem", 4096, 6 * MIB), ("anonymous", 4096, 3 * MIB)]
    assert report["details"]["resident_pages_before_push"] > 0


def test_it_counts_on_from_host_to_host(tmp_path):
    """Watched by `status`, checked at both ends."""
    with (
        source(tmp_path, "--guest", "kvm", "--vcpus", "2", size="16MiB") as here,
        destination(tmp_path) as there,
    ):
        here.runs_on()
        checked = here.ask("check")
        assert (checked["pages_checked"], checked["pages_mismatched"]) == (4096, 0)
        here.runs_on()
        before = here.status()["guest"]
        assert (before["kind"], before["vcpus"], before["trouble"]) == ("kvm", 2, None)
        done = run("migrate", "--admin", here.admin, there.address, "--json")
        assert done.status == 0, done.err
        there.runs_on()
        after = there.status()["guest"]
        assert (after["kind"], after["trouble"]) == ("kvm", None)
        assert all(now > then for then, now in zip(before["steps"], after["steps"], strict=True))
        checked = there.ask("check")
        assert (checked["pages_checked"], checked["pages_mismatched"]) == (4096, 0)
        there.runs_on()


def test_a_machine_that_was_only_asked_for_is_not_kept(tmp_path):
    with destination(tmp_path) as there:
        pid = there.process.pid
        kept = []
        for _ in range(3):
            asked = run("doctor", "--peer", there.address, "--guest", "kvm", "--size", "8MiB", "--vcpus", "3")
            assert asked.status == 0, asked.err
            there.until(lambda _now: "kvm-vcpu" not in Path(f"/proc/{pid}/maps").read_text())
            there.until(lambda _now: not kept or open_files(pid) <= kept[0])
            kept.append(open_files(pid))


def test_memory_is_handed_over_under_a_real_guest(tmp_path):
    with (
        source(tmp_path, "--guest", "kvm", size="16MiB") as here,
        destination(tmp_path, "--listen", f"unix:{tmp_path}/memory.sock") as there,
    ):
        here.runs_on()
        before = here.status()["guest"]["steps"]
        done = run("migrate", "--admin", here.admin, f"unix:{tmp_path}/memory.sock", "--json")
        assert done.status == 0, done.err
        there.runs_on()
        checked = there.ask("check")
        assert (checked["pages_checked"], checked["pages_mismatched"]) == (4096, 0)
        assert all(now > then for then, now in zip(before, checked["steps"], strict=True))


def test_people_are_told_of_a_guest_that_cannot_go_on(tmp_path):
    with source(tmp_path, "--guest", "kvm", "--vcpus", "1", size="8MiB") as here:
        status = here.status()
    assert "guest's trouble" not in dict(status_rows(status))
    status["guest"]["trouble"] = "vCPU 0: KVM_EXIT_SHUTDOWN"
    assert dict(status_rows(status))["guest's trouble"] == "vCPU 0: KVM_EXIT_SHUTDOWN"


def test_a_host_without_kvm_has_no_such_guest():
    done = run("source", "--guest", "kvm", "--size", "8MiB", inside=WITHOUT_KVM)
    assert done.status == 3
    assert "a guest of KVM: no virtual machine can be made: KVM_GET_API_VERSION" in done.one_line()


def test_a_destination_without_kvm_refuses_before_the_guest_stops(tmp_path):
    with (
        source(tmp_path, "--guest", "kvm", size="8MiB") as here,
        destination(tmp_path, inside=WITHOUT_KVM) as there,
    ):
        here.runs_on()
        done = run("migrate", "--admin", here.admin, there.address)
        assert done.status == 4
        assert "a guest of KVM: no virtual machine can be made: KVM_GET_API_VERSION" in done.one_line()
        here.runs_on()
        assert here.ask("check")["pages_mismatched"] == 0
        asked = run("doctor", "--peer", there.address, "--guest", "kvm", "--size", "8MiB")
        assert asked.status == 3
        assert "would not work: a guest of KVM: no virtual machine can be made" in asked.one_line()
        # An emulated guest is welcome there.
        (tmp_path / "other").mkdir()
        with source(tmp_path / "other", size="8MiB") as emulated:
            assert run("migrate", "--admin", emulated.admin, there.address).status == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--workload", "zipf"], "workload zipf is none of a guest of KVM: it knows sequential, stride, random"),
        (["--vcpus", "129"], "129 vCPUs are not in 1 to 128"),
        (["--size", "4KiB"], "1 pages of memory are too few: 7 are its own"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, text):
    done = run("source", "--guest", "kvm", *arguments)
    assert done.status == 2, done.err
    assert text in done.one_line()


def test_a_vcpu_that_touches_a_lost_page_stops_and_the_agent_tells_why(tmp_path):
    with (
        destination(tmp_path) as there,
        source(tmp_path, "--guest", "kvm", "--steps-per-second", "500", size="8MiB") as here,
        Command("migrate", "--admin", here.admin, there.address, "--no-push") as migration,
    ):
        there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 50)
        here.signal(signal.SIGKILL)
        there.until(lambda now: now["state"] == "postcopy-paused")
        assert there.ask("cancel", lost=True)["lost_pages"] > 0
        trouble = there.until(lambda now: now["guest"]["trouble"] is not None)["guest"]["trouble"]
        assert "vCPU 0: it touched a page that is lost: region 0, offset 0x" in trouble
        refused = run("check", "--admin", there.admin)
        assert (refused.status, "it cannot be checked: vCPU 0" in refused.one_line()) == (1, True)
        assert migration.result().status == 6
        there.signal(signal.SIGTERM)
        assert there.wait() == 6
        assert "Traceback" not in there.log
