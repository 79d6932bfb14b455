"""What is typed, and what is said: options that make no sense, failures told once."""

import click
import pytest

from agent.children import Daemon
from agent.demo import with_last_words
from agent.parameters import parse_bandwidth, parse_cpus, parse_limit, parse_seconds
from agent.summary import failure
from postcopy.errors import MigrationCancelled, MigrationLost, MigrationPaused, UsageError

from .agents import run


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-5", "-0.001", "1e999", "soon", ""])
def test_times_that_do_not_pass(text):
    for parse in (parse_seconds, parse_limit):
        with pytest.raises(click.BadParameter):
            parse(text)


def test_times():
    assert [parse_seconds("0"), parse_seconds("2.5"), parse_limit("0.5")] == [0.0, 2.5, 0.5]
    with pytest.raises(click.BadParameter):
        parse_limit("0")


def test_rates():
    assert [parse_bandwidth("0"), parse_bandwidth("1B/s"), parse_bandwidth("10G")] == [0, 1, 10 << 30]
    for text in ("99999999999T", "-1"):
        with pytest.raises((click.BadParameter, UsageError)):
            parse_bandwidth(text)


def test_cpus():
    assert parse_cpus("0,2-3") == (0, 2, 3)
    for text in ("0-99999999999", "5-3", "x", ""):
        with pytest.raises(click.BadParameter):
            parse_cpus(text)


@pytest.mark.parametrize("value", ["-1", "1000000001"])
def test_how_long_to_poll(value):
    done = run("source", "--poll-max-ns", value)
    assert done.status == 2
    assert "--poll-max-ns" in done.one_line()


def test_last_words_are_told_once(tmp_path):
    def daemon(name, words):
        log = tmp_path / f"{name}.log"
        log.write_text(f"11:22:33.444 {name}: first\n11:22:33.555 {words}\n")
        return Daemon(name, [], log)

    lost = "lost after the switchover: it ended"
    two = [daemon("source", f"source: {lost}"), daemon("destination", "destination: gone")]
    assert with_last_words(lost, *two) == f"{lost} (destination: gone)"
    assert with_last_words("over", *two) == f"over (source: {lost}; destination: gone)"
    same = [daemon("source", f"source: {lost}"), daemon("destination", f"destination: {lost}")]
    assert with_last_words(lost, *same) == lost
    assert with_last_words("over", *same) == f"over (source: {lost})"


def test_failures_as_objects():
    assert failure(MigrationLost("gone")) == {
        "schema_version": 1, "outcome": "lost", "error": "gone", "owner": "lost", "exit_status": 6,
    }  # fmt: skip
    assert failure(MigrationCancelled("no"))["outcome"] == "cancelled"
    assert failure(UsageError("not now"))["outcome"] == "refused"
    paused = failure(MigrationPaused("a while"))
    assert (paused["outcome"], paused["owner"], paused["exit_status"]) == ("postcopy-paused", "destination", 5)


def test_the_table_of_exit_statuses():
    said = run("--help").out
    for line in (
        "0        done",
        "7        cancelled or timed out",
        "8        source --resume",
        "128 + n  ended by signal",
    ):
        assert line in said


def test_ready_fd_that_is_none():
    for role in (("destination",), ("source", "--size", "1000T")):  # before anything else: no host has that much memory
        done = run(*role, "--ready-fd", "77")
        assert (done.status, done.one_line()) == (2, "postcopy: --ready-fd 77: Bad file descriptor")
