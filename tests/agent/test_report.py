"""The page of a migration: what it is made of, what it refuses, and that a browser shows it without any network."""

import json
import re
import struct
import sys
import zlib

import pytest

from agent.report import page, plots, runs, trace
from postcopy.errors import UsageError
from postcopy.link.course import Course, Look, distribution
from postcopy.pump.histogram import BUCKETS, Histogram
from tests.programs import outside, say

from .agents import run

TIMES = {"count": 100, "p50": 20e-6, "p90": 50e-6, "p99": 1e-3, "p999": 2e-3, "max": 3e-3, "mean": 30e-6}


def report(**changes):
    return {
        "schema_version": 1, "outcome": "completed", "mode": "auto",
        "memory": [{"type": "shmem", "page_size": 4096, "size_bytes": 400 * 4096}],
        "downtime_seconds": 2e-3, "total_seconds": 0.5, "resident_seconds": 0.4,
        "fault_latency_seconds": TIMES, "stall_seconds": {**TIMES, "mean": 40e-6, "sum": 4e-3},
        "pages": {"total": 400, "demand": 100, "push": 250, "zero": 50, "duplicate": 3},
        "bytes": {"wire": 1_500_000, "placed": 1_400_000}, "throughput_bytes_per_second": 3e6,
        "cpu_seconds": {"source": 0.1, "destination": 0.2},
        "integrity": {"page_size": 4096, "pages_checked": 400, "pages_mismatched": 0},
        "environment": {"kernel": "6.18", "cpus": 2, "pinning": "none", "tls": False, "version": "0"},
        "details": {
            "downtime_parts_seconds": {"stop": 5e-4, "load": 1e-3, "run": 5e-4},
            "course": {
                "seconds": [0.1, 0.2, 0.4], "resident": [0.2, 0.6, 1.0], "received_bytes": [3e5, 9e5, 1.5e6],
                "faults": [40, 70, 100], "p50": [2e-5, 0.0, 3e-5], "p99": [1e-3, 0.0, 2e-3],
            },
            "fault_latency": {"upper_seconds": [2e-5, 1e-3, 3e-3], "counts": [60, 30, 10]},
            "stall": {"upper_seconds": [3e-5, 4e-3], "counts": [60, 40]},
            "fault_parts_seconds": {"faults": 90, "request": 1e-6, "source": 2e-6, "wire": 20e-6, "place": 5e-6},
        },
        **changes,
    }  # fmt: skip


def one(name="a run", **changes):
    return runs.Run(name, report(**changes))


def test_figures_of_a_run():
    assert one().tail("fault_latency") == [(2e-5, 0.4), (1e-3, pytest.approx(0.1)), (3e-3, 0.0)]
    assert [round(rate) for _, rate in one().throughput()] == [3_000_000, 6_000_000, 3_000_000]
    parts = one().fault_parts()
    assert list(parts) == ["request", "source", "wire", "place", "wake"]
    assert (parts["wire"], parts["wake"]) == (20e-6, pytest.approx(10e-6))


def test_a_time_without_faults_is_no_line():
    """A migration that was paused: nothing is known of those seconds, least of all what lies between their ends."""
    _, figure = plots.latency_over_time([one()])
    p50, p99 = figure.axes[0].get_lines()[:2]
    for line, ends in ((p50, (2e-5, 3e-5)), (p99, (1e-3, 2e-3))):
        assert line.get_drawstyle() == "steps-pre"
        assert list(line.get_xdata()) == [0.0, 0.1, 0.2, 0.4]
        assert [str(value) for value in line.get_ydata()] == ["nan", str(ends[0]), "nan", str(ends[1])]


def test_a_migration_that_was_paused_says_so():
    again = one(details={**report()["details"], "reconnects": 2})
    assert [row.words for row in runs.rows([one(), again]) if row.name == "connected anew"] == [["0 times", "2 times"]]
    assert "connected anew" not in {row.name for row in runs.rows([one()])}


def test_a_small_ratio_is_not_nothing():
    assert [page.multiple(ratio) for ratio in (0.0, 0.00063, 0.042, 0.1, 1.0, 33.468)] == [
        "0.00", "0.0006", "0.04", "0.10", "1.00", "33.47",
    ]  # fmt: skip


def test_runs_side_by_side_have_ratios():
    found = {row.name: row for row in runs.rows([one(), one(downtime_seconds=4e-3, throughput_bytes_per_second=6e6)])}
    assert (found["downtime"].words, found["downtime"].ratios) == (["2 ms", "4 ms"], [2.0])
    text = page.page([one("first"), one("<second>", downtime_seconds=4e-3, throughput_bytes_per_second=6e6)], [])
    assert '<td class="ratio worse">2.00 &times;</td>' in text
    assert '<td class="ratio better">2.00 &times;</td>' in text
    assert "&lt;second&gt;" in text
    assert "<second>" not in text


UNCHECKED = {"page_size": 4096, "pages_checked": 0, "pages_mismatched": 0}


def checks(folder, *verdicts):
    files = [folder / f"check{number}.json" for number in range(len(verdicts))]
    for file, verdict in zip(files, verdicts, strict=True):
        file.write_text(json.dumps({"schema_version": 1, "role": "destination", **verdict}))
    return files


def test_the_verdict_of_a_check_joins_its_run(tmp_path):
    several = [one("first", integrity=UNCHECKED), one("second", integrity=UNCHECKED), one("third", integrity=UNCHECKED)]
    right, wrong = {"pages_checked": 400, "pages_mismatched": 0}, {"pages_checked": 400, "pages_mismatched": 2}
    told = runs.read_checks(several, checks(tmp_path, right, wrong))
    row = next(row for row in runs.rows(told) if row.name == "check")
    assert row.words == ["every byte of 400 pages is right", "WRONG: 2 pages differ", "not checked"]
    with pytest.raises(UsageError, match=re.escape("there are 1 runs, and a check for each at most")):
        runs.read_checks([one()], checks(tmp_path, right, wrong))


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ({}, "is no verdict of a check: postcopy check --json prints one"),
        ({"pages_checked": 4}, "there is no pages_mismatched"),
        ({"pages_checked": -1, "pages_mismatched": 0}, "pages_checked is -1: there is nothing below 0 of it"),
        ({"pages_checked": [], "pages_mismatched": 0}, "pages_checked is [], not a number"),
    ],
)
def test_what_is_no_check(verdict, words, tmp_path):
    with pytest.raises(UsageError, match=re.escape(words)):
        runs.read_checks([one()], checks(tmp_path, verdict))


def test_every_plot_is_drawn_of_a_whole_report_and_what_lacks_is_left_out():
    whole = plots.plots([one(), one("another")])
    assert len(whole) == 7
    words = " ".join(svg for _, svg in whole)
    for text in ("switchover", "Fault latency by percentile", "90 %", "another: p99", "push", "load"):
        assert f">{text}" in words or text in words
    bare = one(details={})
    assert len(plots.plots([bare])) == 1
    assert "There is nothing over time" in page.page([bare], plots.plots([bare]))
    assert bare.fault_parts() == {}


def test_the_same_runs_make_the_same_page():
    assert page.page([one()], plots.plots([one()])) == page.page([one()], plots.plots([one()]))


def test_a_wrong_byte_is_not_overlooked():
    text = page.page([one(integrity={"pages_checked": 400, "pages_mismatched": 1})], [])
    assert '<td class="wrong">WRONG: 1 pages differ</td>' in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not the JSON of a report"),
        ("[]", "is no report of a migration"),
        ('{"schema_version": 1, "scenarios": []}', "is no report of a migration"),
        (json.dumps({"schema_version": 1, "outcome": "lost", "error": "gone"}), "did not come through: gone"),
        (json.dumps({"schema_version": 1, "outcome": "completed"}), "it is incomplete: there is no mode"),
    ],
)
def test_what_is_no_report(content, words, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=words):
        runs.read_report(file)
    with pytest.raises(UsageError, match="No such file"):
        runs.read_report(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("details.course.p50", [0.1], "details.course.p50 has 1 values, and details.course.seconds has 3"),
        ("details.course.p99", [0.1, "x", 0.2], "details.course.p99[1] is 'x', not a number"),
        ("details.course.resident", None, "details.course.resident is null, not a list"),
        ("details.course", [1], "details.course is [1], not an object"),
        ("details.stall.counts", [1, -2], "details.stall.counts[1] is -2: there is nothing below 0 of it"),
        ("details.fault_latency.upper_seconds", [], "fault_latency.counts has 3 values, and"),
        ("details.downtime_parts_seconds.load", "1 ms", "details.downtime_parts_seconds.load is '1 ms', not a number"),
        ("details", 5, "details is 5, not an object"),
        ("fault_latency_seconds.p99", None, "fault_latency_seconds.p99 is null, not a number"),
        ("fault_latency_seconds", [], "fault_latency_seconds is [], not an object with 'count'"),
        ("stall_seconds.count", True, "stall_seconds.count is true, not a number"),
        ("pages.demand", "x", "pages.demand is 'x', not a number"),
        ("pages.push", -250, "pages.push is -250: there is nothing below 0 of it"),
        ("pages.left", [], "pages.left is [], not a number"),
        ("downtime_seconds", 10**400, "downtime_seconds is 1000"),
        ("memory", {}, "memory is {}, not a list"),
        ("memory", [{"type": "shmem"}], "it is incomplete: there is no memory[0].size_bytes"),
        ("memory", [7], "memory[0] is 7, not an object with 'type'"),
        ("mode", 1, "mode is 1, not a text"),
        ("environment", "here", "environment is 'here', not an object"),
    ],
)
def test_a_report_that_somebody_broke_is_told_by_its_field(path, value, words, tmp_path):
    found = report()
    *way, last = path.split(".")
    place = found
    for key in way:
        place[key] = dict(place[key])
        place = place[key]
    place[last] = value
    file = tmp_path / "x.json"
    file.write_text(json.dumps(found))
    with pytest.raises(UsageError, match=re.escape(words)):
        runs.read_report(file)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_what_is_endless_or_no_number_is_refused(number, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(report()).replace('"resident_seconds": 0.4', f'"resident_seconds": {number}'))
    with pytest.raises(UsageError, match=r"is no number$|not a number$"):
        runs.read_report(file)


def test_a_report_that_is_whole_is_read(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(report()))
    assert runs.read_report(file) == report()
    file.write_text(json.dumps(report(details={})))
    assert runs.read_report(file)["details"] == {}


def words_of(counts, total_ns):
    buckets = [0] * BUCKETS
    for index, count in counts.items():
        buckets[index] = count
    return struct.pack(f"<{3 + BUCKETS}Q", sum(counts.values()), total_ns, 10**6, *buckets)


def test_the_course_of_a_migration_is_told_in_columns():
    course = Course()
    course._began = 10.0
    course._looks = [Look(10.5, 10, 100, words_of({300: 4}, 1)), Look(11.0, 20, 300, words_of({300: 4, 500: 2}, 2))]
    columns = course.columns(20)
    assert columns["seconds"] == [0.5, 1.0]
    assert columns["resident"] == [0.5, 1.0]
    assert columns["received_bytes"] == [100, 300]
    assert columns["faults"] == [4, 6]
    assert columns["p50"][1] > 10 * columns["p50"][0] > 0  # of the two new faults alone


def test_a_distribution_has_an_end():
    every = Histogram((1,) * BUCKETS, 0, 1 << 62)
    found = distribution(every)
    assert len(found["counts"]) == len(found["upper_seconds"]) <= 500
    assert sum(found["counts"]) == BUCKETS
    assert found["upper_seconds"] == sorted(found["upper_seconds"])


def test_without_matplotlib_it_says_what_to_do(tmp_path, monkeypatch):
    from agent.report.command import report as command
    from postcopy.errors import HostError

    file = tmp_path / "x.json"
    file.write_text(json.dumps(report()))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "agent.report.plots")
    with pytest.raises(HostError, match=rf"{re.escape(sys.executable)} -m pip install matplotlib"):
        command.main([str(file)], standalone_mode=False)


def trace_of(*faults, size=8 * 4096, lost=0):
    regions = [("shmem", 4096, size), ("hugetlb-2M", 2 << 20, 4 << 20)]
    keys = ("type", "page_size", "size_bytes")
    head = {"schema_version": 1, "faults": len(faults), "lost": lost}
    head["regions"] = [dict(zip(keys, region, strict=True)) for region in regions]
    return json.dumps(head).encode() + b"\n" + b"".join(struct.pack("<IIQ", *fault) for fault in faults)


def test_a_name_is_no_formula_and_no_pages_are_no_plot(recwarn):
    strange = one("$x^$", pages={"total": 400, "demand": 0, "push": 0, "zero": 0, "duplicate": 0})
    drawn = "".join(image for _, image in plots.plots([strange]))
    assert "$x^$" in drawn
    assert "Pages by path" not in drawn
    assert [str(one.message) for one in recwarn] == []


def test_a_trace_of_another_run_is_refused_or_told(tmp_path):
    file = tmp_path / "trace"
    file.write_bytes(trace_of((1, 2, 3), lost=98))
    memory = [{"type": "shmem", "page_size": 4096, "size_bytes": size} for size in (8 * 4096, 4 << 20)]
    assert "counts 100 faults and the trace 99: it may be of another run" in plots.traced(file, one(memory=memory))[0]
    file.write_bytes(trace_of((1, 2, 3), lost=99))
    assert "another run" not in plots.traced(file, one(memory=memory))[0]
    with pytest.raises(
        UsageError, match=r"is of another run than a run: of memory of 32 KiB, 4 MiB, and not of 1\.56 MiB"
    ):
        plots.traced(file, one())


def test_a_trace_is_read_as_seconds_and_addresses(tmp_path):
    file = tmp_path / "trace"
    file.write_bytes(trace_of((1000, 500, 3 | 77 << 42), (2000, 700, 1 | 1 << 34 | 1 << 40 | 78 << 42), lost=5))
    found = trace.read_trace(file)
    assert list(found.seconds) == [0.001, 0.002]
    assert list(found.latency) == [500e-9, 700e-9]
    assert list(found.address) == [3 * 4096, 8 * 4096 + (2 << 20)]
    assert list(found.found) == [0, 1]
    assert list(found.thread) == [77, 78]
    memory = [{"size_bytes": size} for size in (8 * 4096, 4 << 20)]
    text, svg = plots.traced(file, one(memory=memory))
    assert text.startswith("2 faults of 2 threads; their pages were: 1 asked for, 1 on its way, 0 here already.")
    assert "no room for 5" in text
    assert "Faults by time and address" in svg
    file.write_bytes(trace_of())
    assert plots.traced(file, one(memory=memory))[0].startswith("0 faults")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "its first line is no object of JSON"),
        (b"\xff\n", "its first line is no object of JSON"),
        (b"{}\n", "it is incomplete: there is no schema_version"),
        (b"[]\n", "its first line is [], not an object"),
        (b'{"schema_version": 2}\n', "its schema_version is 2, and this version reads 1"),
        (trace_of().replace(b'"lost": 0', b'"lost": null'), "lost is null, not a whole number from 0 on"),
        (trace_of(size=-1), "regions[0].size_bytes is -1, not a whole number from 1 on"),
        (trace_of(size=float("nan")), "regions[0].size_bytes is 'NaN', not a whole number"),
        (trace_of((1, 2, 3))[:-1], "1 faults are 16 bytes behind the first line, and it has 15"),
        (trace_of((1, 2, 3 | 9 << 34)), "there is no region 9"),
    ],
)
def test_what_is_no_trace(content, words, tmp_path):
    file = tmp_path / "trace"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(f"is no trace of faults: {words}")):
        trace.read_trace(file)


def test_a_trace_that_cannot_be_written_is_told_at_once(tmp_path):
    done = run("destination", "--trace", tmp_path / "none" / "trace")
    assert (done.status, done.one_line()) == (2, f"postcopy: --trace: {tmp_path}/none/trace: No such file or directory")


def colours_of(png):
    """Return how many colours the rows of an 8-bit RGB(A) image have."""
    data, offset, header = b"", 8, None
    while offset < len(png):
        length, kind = struct.unpack_from(">I4s", png, offset)
        if kind == b"IHDR":
            header = struct.unpack_from(">IIBB", png, offset + 8)
        elif kind == b"IDAT":
            data += png[offset + 8 : offset + 8 + length]
        offset += 12 + length
    assert header is not None
    return header[0], header[1], len(set(zlib.decompress(data)))


def test_a_browser_shows_a_real_migration(tmp_path):
    files = []
    for name, more in (("push", ()), ("touch", ("--no-push", "--seconds", "0.2"))):
        done = run("demo", "--size", "32MiB", "--json", "--trace", tmp_path / f"{name}.trace", *more)
        assert done.status == 0, done.err
        course = done.json["details"]["course"]
        assert course["resident"][-1] == 1.0
        assert course["seconds"] == sorted(course["seconds"])
        assert course["faults"][-1] == done.json["fault_latency_seconds"]["count"]
        assert sum(done.json["details"]["fault_latency"]["counts"]) == done.json["fault_latency_seconds"]["count"]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(done.out)
    made = tmp_path / "page.html"
    done = run("report", *files, "-o", made, "--trace", tmp_path / "push.trace")
    assert (done.status, done.out, done.err) == (0, f"{made}\n", "")
    text = made.read_text()
    asked = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"|url\((?!#)([^)]*)\)|@import', text)
    assert asked == []
    browser = ["--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--window-size=1000,2600"]
    shot = tmp_path / "shot.png"
    dump = say("chromium-headless-shell", *browser, "--dump-dom", f"--screenshot={shot}", made.as_uri())
    assert dump.returncode == 0, dump.stderr
    assert dump.stdout.count("<svg") == 8
    assert f"{json.loads(files[0].read_text())['fault_latency_seconds']['count']} faults of 2 threads" in dump.stdout
    assert "2 migrations side by side" in dump.stdout
    width, height, colours = colours_of(shot.read_bytes())
    assert (width, height) == (1000, 2600)
    assert colours > 50
    assert outside("chromium-headless-shell")
