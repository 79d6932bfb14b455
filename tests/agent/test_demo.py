"""The main job: every memory type and mode with a few workloads, checked to the last byte."""

import contextlib
import json
import os
import pty
import subprocess

import pytest

from .agents import AGENT, ROOT, run

HISTOGRAM = {"count", "p50", "p90", "p99", "p999", "max", "mean"}
KEYS = {
    "schema_version",
    "outcome",
    "mode",
    "memory",
    "downtime_seconds",
    "total_seconds",
    "resident_seconds",
    "fault_latency_seconds",
    "stall_seconds",
    "pages",
    "bytes",
    "throughput_bytes_per_second",
    "cpu_seconds",
    "integrity",
    "environment",
    "details",
}


def check_report(report, memory, mode, size):
    assert set(report) == KEYS
    assert report["schema_version"] == 1
    assert report["outcome"] == "completed"
    assert report["mode"] == mode
    page_size = 4096 if memory == "shmem" else 2 << 20
    assert report["memory"] == [{"type": memory, "page_size": page_size, "size_bytes": size}]
    pages = report["pages"]
    assert pages["demand"] + pages["push"] + pages["zero"] == pages["total"] == size // page_size
    assert pages["demand"] > 0
    assert report["integrity"] == {"page_size": 4096, "pages_checked": size // 4096, "pages_mismatched": 0}
    assert set(report["fault_latency_seconds"]) == HISTOGRAM
    assert set(report["stall_seconds"]) == HISTOGRAM | {"sum"}
    assert report["fault_latency_seconds"]["count"] > 0
    assert 0 < report["downtime_seconds"] < report["total_seconds"]
    assert 0 < report["resident_seconds"] < report["total_seconds"]
    assert set(report["environment"]) == {"kernel", "cpus", "pinning", "tls", "version"}
    assert min(report["cpu_seconds"].values()) > 0


@pytest.mark.parametrize(
    ("memory", "mode", "workload"),
    [
        ("shmem", "auto", "random"),
        ("shmem", "minor", "increment"),
        ("shmem", "missing", "sequential"),
        ("hugetlb-2M", "auto", "increment"),
        ("hugetlb-2M", "minor", "zipf"),
        ("hugetlb-2M", "missing", "stride"),
    ],
)
def test_every_byte_arrives(memory, mode, workload, huge_pages):
    if memory != "shmem":
        huge_pages(memory, 64)
    done = run("demo", "--memory", memory, "--mode", mode, "--workload", workload, "--size", "64MiB", "--json")
    assert done.status == 0, done.err
    check_report(done.json, memory, mode, 64 << 20)


@pytest.mark.parametrize("memory", ["shmem", "hugetlb-2M"])
def test_without_push_the_guest_fetches_its_pages_itself(memory, huge_pages):
    if memory != "shmem":
        huge_pages(memory, 64)
    done = run("demo", "--memory", memory, "--size", "64MiB", "--no-push", "--seconds", "0.5", "--json")
    assert done.status == 0, done.err
    report = done.json
    check_report(report, memory, "auto", 64 << 20)
    # what is not visited lies still at the source when the push begins
    assert 0 < report["details"]["resident_pages_before_push"] < report["pages"]["total"]


def test_people_get_a_summary_and_no_bars_in_a_pipe():
    done = run("demo", "--size", "16MiB", "--vcpus", "1")
    assert done.status == 0, done.err
    assert "every byte of 4096 pages (4 KiB each) is right" in done.out
    for word in ("downtime", "total time", "fault latency", "guest's stall", "pages", "bytes"):
        assert f"\n{word} " in "\n" + done.out
    assert "\x1b" not in done.out + done.err
    assert [line for line in done.err.splitlines() if not line.startswith("postcopy: ")] == []


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--memory", "floppy"], 2, "unknown memory type 'floppy': known are shmem, hugetlb-2M, hugetlb-1G"),
        (["--size", "5000"], 2, "size 5000 is not a multiple of the page size 4096"),
        (["--memory", "hugetlb-2M", "--size", "3MiB"], 2, "size 3145728 is not a multiple of the page size 2097152"),
        (["--size", "12 parsecs"], 2, "size '12 parsecs' is not understood"),
        (["--mode", "magic"], 2, "unknown mode 'magic': known are auto, minor, missing"),
        (["--workload", "sleep"], 2, "unknown workload 'sleep'"),
        (["--guest", "poltergeist"], 2, "unknown kind of guest 'poltergeist': known are emulated"),
        (["--vcpus", "0"], 2, "'--vcpus': 0 is not in the range 1<=x<=512"),
        (["--memory", "hugetlb-2M", "--size", "512G"], 3, "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"),
        (["--size", "3T"], 3, "of shmem asked for"),
        (["--size", "1000T"], 2, "guest_pages 268435456000 is not in 1 to 1073741824"),
        (["--colour"], 2, "No such option '--colour'"),
        (["--seconds", "nan"], 2, "'nan' is not a time that passes"),
        (["--timeout", "-1"], 2, "'-1' is not a time that passes"),
        (["--timeout", "0"], 2, "within no time nothing is done"),
        (["--max-postcopy-bandwidth", "99999999T"], 2, "more than any network carries"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, status, text):
    done = run("demo", *arguments)
    assert done.status == status, done.err
    assert text in done.one_line()
    assert done.out == ""


def test_a_trace_that_has_no_room_is_told():
    done = run("demo", "--size", "8MiB", "--no-push", "--seconds", "0", "--trace", "/dev/full", "--json")
    assert done.status == 0
    assert "postcopy: the trace /dev/full cannot be written: No space left on device" in done.err.splitlines()


def test_json_is_one_line_on_stdout():
    done = run("demo", "--size", "8MiB", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)
    assert done.out.count("\n") == 1


def test_a_terminal_gets_a_bar_and_colours_only_if_it_wants_them():
    for extra, coloured in ((), True), (("NO_COLOR=1",), False):
        command = ["env", "-u", "NO_COLOR", "TERM=xterm", *extra, *AGENT, "demo", "--size", "8MiB"]
        main, child = pty.openpty()
        process = subprocess.Popen(command, stdout=child, stderr=child, cwd=ROOT)
        os.close(child)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(main, 4096):
                shown += piece
        os.close(main)
        assert process.wait(10) == 0
        assert b"migration" in shown
        assert b"is right" in shown
        assert (b"\x1b[1;36m" in shown) == coloured
