"""Logs: words for people, objects for programs, priorities for the journal; a line for each change of state."""

import json
import logging
import os
import sys

import pytest

from agent import logs
from postcopy.link.about import About, speak_of

from .agents import ENVIRONMENT, destination, run, source


@pytest.fixture
def as_json(monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "POSTCOPY_LOG_FORMAT", "auto")


def record(text, level=logging.INFO, **extra):
    made = logging.LogRecord("postcopy.session", level, "file", 1, text, (), None)
    made.__dict__.update(extra)
    return made


def test_objects_say_whom_they_are_about():
    speak_of(About("source", "ab12"))
    try:
        said = json.loads(logs.JsonLines().format(record("source: none -> setup", state="setup")))
    finally:
        speak_of(About())
    assert said.pop("time").endswith("+00:00")
    assert said == {
        "level": "info", "logger": "postcopy.session", "role": "source", "migration": "ab12", "state": "setup",
        "message": "none -> setup",
    }  # fmt: skip


def test_lines_of_the_journal_have_their_priority():
    lines = logs.ForJournal(logs.text_lines(debug=False)).format(record("one\ntwo", logging.WARNING)).splitlines()
    assert [line[:3] for line in lines] == ["<4>", "<4>"]
    assert [line.rpartition(" ")[2].removeprefix("<4>") for line in lines] == ["one", "two"]


def test_the_journal_is_known_by_its_file(monkeypatch, tmp_path):
    with (tmp_path / "log").open("w") as stream:
        there = os.fstat(stream.fileno())
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{there.st_dev}:{there.st_ino}")
        assert logs.stderr_is_journal()
        monkeypatch.setenv("JOURNAL_STREAM", f"{there.st_dev}:{there.st_ino + 1}")
        assert not logs.stderr_is_journal()


def objects(daemon):
    return [json.loads(line) for line in daemon.log.splitlines()]


def test_a_migration_in_the_logs_of_both_daemons(tmp_path, as_json):
    with destination(tmp_path) as there, source(tmp_path, size="8MiB") as here:
        assert run("migrate", "--admin", here.admin, there.address).status == 0
        there.until(lambda now: now["state"] == "completed")
        left, came = objects(here), objects(there)
    assert {one["role"] for one in left} == {"source"}
    assert {one["role"] for one in came} == {"destination"}
    states = [[one["state"] for one in log if "state" in one] for log in (left, came)]
    assert states[0] == ["setup", "device", "postcopy-active", "completed"]
    assert states[1] == ["setup", "device", "postcopy-active", "completed"]
    ids = {one["migration"] for log in (left, came) for one in log if "migration" in one}
    assert len(ids) == 1
    assert len(ids.pop()) == 32
    assert len(left) + len(came) < 30  # nothing for a page


def test_the_last_words_of_a_daemon_are_an_object_and_those_of_a_command_are_not(as_json):
    done = run("destination", "--listen", "tcp:192.0.2.1:1", "--insecure")
    said = json.loads(done.err)
    assert (done.status, said["level"], said["role"]) == (2, "error", "destination")
    assert said["message"].startswith("--listen: cannot listen on tcp:192.0.2.1:1")
    assert run("status", "--admin", "unix:/nowhere").one_line().startswith("postcopy: no agent answers")
