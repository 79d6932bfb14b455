"""Watching a migration: what two looks make, what is drawn of it, and a real one through either side's socket."""

import io
import json
import os
import pty
import signal
from types import SimpleNamespace

import pytest
from rich.console import Console

from agent.cli import told_apart
from agent.look import CELLS
from agent.look import look as look_at
from agent.metrics import Figures
from agent.output import print_json
from agent.top import view
from agent.top.rates import Watch
from postcopy.errors import PostcopyError
from postcopy.link.latencies import sparse
from postcopy.pump.histogram import BUCKETS, Histogram, bucket_lower_ns
from postcopy.wire.latencies import Latencies

from .agents import AGENT, ENVIRONMENT, ROOT, Command, destination, run, source


def histogram(*counts):
    """A histogram of (microseconds, count)."""
    buckets = [0] * BUCKETS
    for us, count in counts:
        index = next(i for i in range(BUCKETS) if bucket_lower_ns(i + 1) > us * 1000)
        buckets[index] += count
    longest = max((us for us, _ in counts), default=0)
    return Histogram(tuple(buckets), sum(us * 1000 * count for us, count in counts), longest * 1000).sparse()


def look(at, remaining, *faults, **changes):
    return {
        "schema_version": 1, "at_seconds": at, "role": "destination", "state": "postcopy-active", "owns_guest": True,
        "memory_bytes": 1000, "remaining_bytes": remaining, "pages": {"demand": 1000 - remaining},
        "transferred_bytes": {"received": 4 * (1000 - remaining)}, "waiting_faults": 1,
        "latencies_told_at_seconds": None, "fault_latency": histogram(*faults), "stall_per_vcpu": [histogram(*faults)],
        "residency": [1.0, 0.5, 0.0],
        **changes,
    }  # fmt: skip


def test_the_first_look_has_totals_and_no_rates():
    now = Watch().take(look(5.0, 900, (10, 7)))
    assert now["resident"] == pytest.approx(0.1)
    assert (now["faults_per_second"], now["to_go_seconds"]) == (0.0, None)
    assert now["fault_latency_seconds"]["overall"]["count"] == 7
    assert now["fault_latency_seconds"]["latest"]["count"] == 0


def test_two_looks_make_rates():
    watch = Watch()
    watch.take(look(5.0, 900, (10, 100)))
    now = watch.take(look(7.0, 700, (10, 100), (1000, 50)))
    assert now["pages_per_second"] == {"demand": 100.0}
    assert now["bytes_per_second"] == {"received": 400.0}
    assert now["faults_per_second"] == 25.0
    assert now["to_go_seconds"] == pytest.approx(7.0)
    latest, overall = now["fault_latency_seconds"]["latest"], now["fault_latency_seconds"]["overall"]
    assert (latest["count"], overall["count"]) == (50, 150)
    assert latest["p50"] == pytest.approx(1e-3, rel=0.03)
    assert overall["p50"] == pytest.approx(1e-5, rel=0.03)
    assert sum(count for _, count in now["fault_latency_octaves"]["latest"]) == 50
    assert sum(count for _, count in now["fault_latency_octaves"]["overall"]) == 150
    assert now["stall_seconds_per_vcpu"][0]["latest"]["count"] == 50


def test_the_time_to_go_follows_the_latest_looks():
    watch = Watch()
    remaining = [1000, 999, 998, 997, 996, 995, 895, 795, 695, 595, 495]  # slow, then fast
    seen = [watch.take(look(float(at), left)) for at, left in enumerate(remaining)]
    assert seen[4]["to_go_seconds"] == pytest.approx(996.0)
    assert seen[-1]["to_go_seconds"] == pytest.approx(4.95)
    assert watch.take(look(20.0, 495))["to_go_seconds"] is not None
    for at in range(30, 35):
        standing = watch.take(look(float(at), 495))
    assert standing["to_go_seconds"] is None
    assert watch.take(look(40.0, 0, state="completed"))["to_go_seconds"] is None


@pytest.mark.parametrize("before", [0, 1000], ids=["at the destination", "at the source"])
def test_the_time_to_go_counts_from_where_pages_began_to_move(before):
    watch = Watch()
    for at in range(10):
        assert watch.take(look(float(at), before, state="none", pages={}))["to_go_seconds"] is None
    assert watch.take(look(10.0, 900))["to_go_seconds"] is None
    assert watch.take(look(11.0, 800))["to_go_seconds"] == pytest.approx(8.0)
    assert watch.take(look(12.0, 950, pages={"demand": 1200}))["to_go_seconds"] is None  # the next one, unseen between
    assert watch.take(look(13.0, 850, pages={"demand": 1300}))["to_go_seconds"] == pytest.approx(8.5)


def test_another_migration_begins_anew():
    watch = Watch()
    watch.take(look(1.0, 100, (10, 500)))
    now = watch.take(look(2.0, 990, (10, 5)))
    assert now["faults_per_second"] == 0.0
    assert now["fault_latency_seconds"]["overall"]["count"] == 5


def test_vcpus_that_come_have_no_latest_moment():
    watch = Watch()
    watch.take(look(1.0, 1000, stall_per_vcpu=[]))
    now = watch.take(look(2.0, 1000, stall_per_vcpu=[histogram((5, 3))]))
    assert now["stall_seconds_per_vcpu"][0]["overall"]["count"] == 3
    assert now["stall_seconds_per_vcpu"][0]["latest"]["count"] == 0


def told(at, remaining, told_at, *faults, **changes):
    """A look at a source whose destination told of these faults at that moment."""
    pages = {"demand": 1000 - remaining}
    return look(at, remaining, *faults, role="source", pages=pages, latencies_told_at_seconds=told_at, **changes)


def test_what_is_told_has_its_own_times():
    watch = Watch()
    watch.take(told(5.0, 900, 4.5, (10, 100)))
    now = watch.take(told(7.0, 700, 6.5, (10, 100), (1000, 50)))
    assert now["faults_per_second"] == 25.0
    assert now["fault_latency_seconds"]["latest"]["count"] == 50
    assert now["stall_seconds_per_vcpu"][0]["latest"]["count"] == 50


def test_between_two_words_of_the_destination_the_latest_moment_stays():
    watch = Watch()
    watch.take(told(5.0, 900, 4.9, (10, 100)))
    first = watch.take(told(5.4, 850, 5.3, (10, 140)))
    second = watch.take(told(5.5, 800, 5.3, (10, 140)))
    third = watch.take(told(5.9, 750, 5.8, (10, 150)))
    for now, rate, count in ((first, 100.0, 40), (second, 100.0, 40), (third, 20.0, 10)):
        assert now["faults_per_second"] == pytest.approx(rate)
        assert now["fault_latency_seconds"]["latest"]["count"] == count
        assert sum(one for _, one in now["fault_latency_octaves"]["latest"]) == count
        assert now["stall_seconds_per_vcpu"][0]["latest"]["count"] == count


@pytest.mark.parametrize("state", ["postcopy-paused", "completed"])
def test_where_nothing_more_is_told_there_is_no_latest_moment(state):
    watch = Watch()
    watch.take(told(5.0, 900, 4.9, (10, 100)))
    last = watch.take(told(5.4, 850, 5.3, (10, 140), state=state))
    assert last["fault_latency_seconds"]["latest"]["count"] == 40
    now = watch.take(told(6.0, 850, 5.3, (10, 140), state=state))
    assert (now["fault_latency_seconds"]["latest"]["count"], now["faults_per_second"]) == (0, 0.0)
    assert now["fault_latency_seconds"]["overall"]["count"] == 140


def test_stalls_there_have_nothing_to_do_with_those_before_the_switchover():
    watch = Watch()
    watch.take(look(5.0, 1000, role="source", stall_per_vcpu=[histogram((5, 3))]))
    now = watch.take(told(6.0, 900, 5.9, (10, 7), stall_per_vcpu=[histogram((5, 9))]))
    assert now["stall_seconds_per_vcpu"][0]["overall"]["count"] == 9
    assert now["stall_seconds_per_vcpu"][0]["latest"]["count"] == 0
    assert now["fault_latency_seconds"]["latest"]["count"] == 0


def test_counts_that_go_back_are_drawn_as_nothing_new():
    watch = Watch()
    watch.take(told(5.0, 900, 4.9, (10, 5), (1000, 1), stall_per_vcpu=[histogram((5, 9))]))
    now = watch.take(told(6.0, 800, 5.9, (10, 1), (1000, 9), stall_per_vcpu=[histogram((7, 2))]))
    assert now["fault_latency_seconds"]["latest"]["count"] == 0
    assert now["fault_latency_seconds"]["overall"]["count"] == 10
    assert now["stall_seconds_per_vcpu"][0]["latest"]["count"] == 0
    assert "faults, all" in drawn(now)


class Left:
    """A source, and what its destination has told."""

    def __init__(self, latencies):
        self.latencies = latencies


def test_a_look_has_the_guests_own_stalls_while_it_is_here_and_then_what_is_told():
    figures = Figures("source")
    own, there = Histogram.from_sparse(histogram((5, 3))), Histogram.from_sparse(histogram((9, 4)))
    guest = SimpleNamespace(stall_per_vcpu=[own])
    left = Left((7.5, Latencies(sparse(there), (sparse(own), sparse(there)))))
    for seen in (look_at(figures, 8, guest, [], left), look_at(figures, 8, guest, [], Left(None))):
        assert (seen["latencies_told_at_seconds"], seen["stall_per_vcpu"]) == (None, [own.sparse()])
    before = look_at(figures, 8, None, [], Left(None))
    assert (before["latencies_told_at_seconds"], before["stall_per_vcpu"]) == (None, [])
    assert before["fault_latency"] == Histogram().sparse()
    after = look_at(figures, 8, None, [], left)
    assert after["latencies_told_at_seconds"] == 7.5
    assert (after["fault_latency"], after["stall_per_vcpu"]) == (there.sparse(), [own.sparse(), there.sparse()])


def test_a_look_is_what_every_parser_of_json_reads(capsys):
    print_json(Watch().take(look(5.0, 900, (10, 7))))
    now = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert now["fault_latency_octaves"]["latest"][-1] == [None, 0]
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"endless": float("inf")})
    assert capsys.readouterr().out == ""


def test_none_and_all_are_seen_apart_from_a_bit_and_almost():
    assert [view.shade(part) for part in (0.0, 0.001, 0.4, 0.999, 1.0)] == [" ", "░", "▒", "▓", "█"]


def drawn(now, width=100, height=60):
    console = Console(file=io.StringIO(), width=width)
    console.print(view.screen(now, height))
    return console.file.getvalue()


def test_a_screen_and_a_line():
    watch = Watch()
    watch.take(look(5.0, 900, (10, 100)))
    now = watch.take(look(7.0, 700, (10, 100), (1000, 50)))
    screen = drawn(now)
    for words in (
        "postcopy-active",
        "owns the guest",
        "30.0 %",
        "7 s to go",
        "█▒ ",
        "faults, now",
        "vCPU 0 stalls, all",
        "< 1.02 ms",
    ):
        assert words in screen, screen
    line = view.line(now)
    assert line.startswith("destination postcopy-active, 30.0 % resident, 700 B to come, 25 faults/s, p50 ")
    assert line.endswith("7 s to go")
    quiet = Watch().take(look(5.0, 900, role="source"))
    assert "faults" not in view.line(quiet)
    assert "faults" not in drawn(quiet)
    watch.take(told(9.0, 700, 9.0, (10, 100)))
    known = watch.take(told(11.0, 600, 11.0, (10, 100), (1000, 50)))
    assert ", 25 faults/s, p50 " in view.line(known)
    for words in ("25 faults/s", "faults, now", "vCPU 0 stalls, all", "< 1.02 ms"):
        assert words in drawn(known), words
    assert "waiting" not in drawn(known)
    empty = look(1.0, 0, memory_bytes=0, pages={}, residency=[], stall_per_vcpu=[], state="none", owns_guest=False)
    screen = drawn(Watch().take(empty))
    assert ("owns no guest" in screen, "no guest has come" in screen, "0.0 %" in screen) == (True, True, False)


def test_each_side_says_of_what_its_map_is():
    for role, words in (("destination", "memory that is here"), ("source", "memory that has left")):
        assert words in drawn(Watch().take(look(5.0, 900, role=role)))


def test_the_histogram_is_of_the_latest_moment_and_in_the_end_of_all():
    watch = Watch()
    watch.take(look(5.0, 900, (10, 100)))
    going = drawn(watch.take(look(7.0, 700, (10, 100), (1000, 50))))
    assert bars_of(going) == {"< 1.02 ms": 50}
    assert going.count("faults, now") == 2  # of the histogram, and of the table
    over = drawn(watch.take(look(9.0, 0, (10, 100), (1000, 50), state="completed")))
    assert {bound: count for bound, count in bars_of(over).items() if count} == {"< 16 µs": 100, "< 1.02 ms": 50}
    assert (over.count("faults, all"), over.count("faults, now")) == (2, 1)


def bars_of(screen):
    return {line.partition("█")[0].strip(): int(line.split()[-1]) for line in screen.splitlines() if "< " in line}


@pytest.mark.parametrize("vcpus", [0, 2, 8, 64])
@pytest.mark.parametrize("height", [24, 40])
def test_every_part_has_its_place_on_a_low_terminal(vcpus, height):
    every = [(1 << octave, 3 + octave) for octave in range(20)]
    stalls = [histogram((100 * (vcpu % 7 + 1), 5)) for vcpu in range(vcpus)]
    watch = Watch()
    watch.take(look(5.0, 900, stall_per_vcpu=stalls))
    now = watch.take(look(7.0, 700, *every, stall_per_vcpu=stalls, residency=[1.0, 0.5] * (CELLS // 2)))
    screen = drawn(now, 80, height)
    lines = screen.splitlines()
    assert len(lines) <= height, screen
    assert screen.count("█") >= CELLS // 2
    assert screen.count("▒") == CELLS // 2
    assert "…" not in screen
    bars = [int(line.split()[-1]) for line in lines if "< " in line]
    assert len(bars) > 5, screen
    assert sum(bars) == sum(count for _, count in every)
    shown = [line for line in lines if "stalls, all" in line]
    assert len(shown) == vcpus or f"and {vcpus - len(shown)} more" in screen, screen
    assert len(shown) >= min(vcpus, 3)
    if len(shown) < vcpus:
        assert "vCPU 6 stalls" in screen  # one of those that waited longest


def seen_from(daemon):
    return run("top", "--admin", daemon.admin, "--count", "1", "--json").json


def seen_once(daemon, wanted):
    """What `top` shows of a daemon once it is as wanted."""
    with Command("top", "--admin", daemon.admin, "--json", "--interval", "0.05") as top:
        for line in top.process.stdout:
            if wanted(now := json.loads(line)):
                return now
    pytest.fail("top has ended")


def test_a_real_migration_is_watched_from_both_sides(tmp_path):
    with destination(tmp_path) as there, source(tmp_path, "--steps-per-second", "2000") as here:
        idle = run("top", "--admin", there.admin, "--count", "1")
        assert (idle.status, idle.out) == (0, "destination none, no guest has come\n")
        assert seen_from(here)["residency"] == [0.0] * CELLS
        with Command("migrate", "--admin", here.admin, there.address, "--no-push") as migration:
            there.until(lambda now: now["pages"]["placed"] > 500)
            done = run("top", "--admin", there.admin, "--count", "3", "--interval", "0.1", "--json")
            looks = [json.loads(line, parse_constant=pytest.fail) for line in done.out.splitlines()]
            assert [one["state"] for one in looks] == ["postcopy-active"] * 3
            assert looks[-1]["faults_per_second"] > 0
            assert looks[-1]["fault_latency_seconds"]["latest"]["p50"] > 0
            latest = looks[-1]["fault_latency_octaves"]["latest"]
            assert [bound is None for bound, _ in latest] == [False] * 24 + [True]
            assert looks[0]["remaining_bytes"] > looks[-1]["remaining_bytes"] > 0
            assert len(looks[-1]["residency"]) == CELLS
            mean = sum(looks[-1]["residency"]) / CELLS
            assert mean == pytest.approx(looks[-1]["resident"], abs=0.05)
            left = seen_from(here)["residency"]  # later: what is there has left
            assert [(had, has) for had, has in zip(looks[-1]["residency"], left, strict=True) if had > has] == []
            assert 0 < sum(left) / CELLS < 1
            told = seen_once(here, lambda now: now["fault_latency_seconds"]["overall"]["count"] > 500)
            assert told["fault_latency_seconds"]["overall"]["p50"] > 0
            assert [vcpu["overall"]["count"] > 0 for vcpu in told["stall_seconds_per_vcpu"]] == [True] * 2
            assert len(looks[-1]["stall_seconds_per_vcpu"]) == 2
            with Command("top", "--admin", here.admin, "--until-over", "--interval", "0.1") as follower:
                run("set", "--admin", here.admin, "--push")
                assert migration.result(30).status == 0
                followed = follower.result(30)
            assert followed.status == 0, followed.err
            assert followed.out.splitlines()[-1].startswith("source completed, 100.0 % resident, 0 B to come")
        ended = [seen_from(one) for one in (there, here)]
        assert [one["residency"] for one in ended] == [[1.0] * CELLS] * 2
        faults = ended[0]["fault_latency_seconds"]["overall"]
        assert ended[1]["fault_latency_seconds"]["overall"] == faults
        report = here.status()["report"]["fault_latency_seconds"]
        assert report == {key: faults[key] for key in report}


def test_on_a_terminal_ctrl_c_is_how_one_leaves(tmp_path):
    import subprocess

    with source(tmp_path, size="8MiB") as here:
        leader, follower = pty.openpty()
        environment = {**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        command = [*AGENT, "top", "--admin", here.admin, "--interval", "0.1"]
        with subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, cwd=ROOT, env=environment) as top:
            os.close(follower)
            seen = b""
            while b"owns the guest" not in seen:
                seen += os.read(leader, 4096)
            top.send_signal(signal.SIGINT)
            assert top.wait(20) == 0
            assert top.stderr.read() == b""
        os.close(leader)


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_whoever_reads_may_have_seen_enough(form, tmp_path):
    with (
        source(tmp_path, size="8MiB") as here,
        Command("top", "--admin", here.admin, "--interval", "0.05", *form) as top,
    ):
        assert top.process.stdout.readline()
        top.process.stdout.close()
        assert top.process.wait(20) == 0
        assert top.process.stderr.read() == ""


def test_a_connection_that_breaks_is_not_the_output():
    with pytest.raises(PostcopyError, match="a connection was closed"), told_apart():
        raise BrokenPipeError


def test_an_agent_that_is_not_there_or_goes(tmp_path):
    assert run("top", "--admin", "unix:/nowhere").one_line().startswith("postcopy: no agent answers")
    with source(tmp_path, size="8MiB") as here, Command("top", "--admin", here.admin, "--interval", "0.05") as top:
        top.process.stdout.readline()
        here.signal(signal.SIGKILL)
        gone = top.result(20)
        assert gone.status != 0
        assert len(gone.err.strip().splitlines()) == 1
