"""Does the search keep what is worth it? What it adds, what is smaller, and what comes to a bad end."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from . import collect
from .collect import Collection
from .targets import TARGETS

NAME = "preambles"


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collection:
    """An empty collection, in a folder of its own."""
    monkeypatch.setattr(collect, "SAID", tmp_path / "said")
    monkeypatch.chdir(tmp_path)
    return Collection(NAME)


def test_what_takes_another_step_is_kept_and_of_two_that_take_the_same_the_smaller(found: Collection) -> None:
    for data in (b"POSTCOP", b"nonsense", b"other nonsense", b"none"):
        found.take(data)
    kept = found.kept()
    assert b"POSTCOP" in kept
    assert b"none" in kept
    assert b"other nonsense" not in kept
    found.write(kept)
    assert {file.read_bytes() for file in found.folder.iterdir()} == set(kept)
    found.write([b"none"])  # and what adds nothing any more goes
    assert [file.read_bytes() for file in found.folder.iterdir()] == [b"none"]


def test_how_often_a_step_is_taken_counts(found: Collection) -> None:
    few, many = (frozenset(collect.steps_of("packed", b"\x91" * count + b"\xc0")) for count in (2, 40))
    assert few != many


def test_a_bad_end_is_written_down_by_its_smallest_input_and_the_search_goes_on(
    found: Collection, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(data: bytes) -> None:
        assert b"\0" not in data

    monkeypatch.setitem(TARGETS, NAME, fails)
    for data in (b"one\0", b"\0", b"two\0"):
        found.take(data)
    assert list(found.crashes.values()) == [b"\0"]
    (file,) = Path().glob("crash-preambles-*")
    assert file.read_bytes() == b"\0"
    assert f"{file}: Traceback" in capsys.readouterr().out
    found.write([b"\0"])
    searched = collect.collect(NAME, 0)  # beside what is kept an input is drawn, however little time there is
    assert searched.tried == 2
    assert len(searched.crashes) == 1


def test_what_should_be_refused_and_is_not_comes_to_a_bad_end(
    found: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passes(_data: bytes) -> None:
        with pytest.raises(ValueError, match="nothing"):
            pass

    monkeypatch.setitem(TARGETS, NAME, passes)
    found.take(b"x")
    assert list(found.crashes.values()) == [b"x"]
    (file,) = Path().glob("crash-preambles-*")
    assert file.read_bytes() == b"x"


def test_an_input_that_takes_for_ever_is_one_that_comes_to_a_bad_end(
    found: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stays(_data: bytes) -> None:
        with contextlib.suppress(Exception):  # as a target that expects errors of the system
            while True:
                pass

    monkeypatch.setattr(collect, "CPU_SECONDS_MAX", 0.05)
    monkeypatch.setitem(TARGETS, NAME, stays)
    found.take(b"x")
    assert list(found.crashes.values()) == [b"x"]
