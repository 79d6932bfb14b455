"""Do the rules bite? Each deliberate fault has to be found by the rule that is meant for it, within so many seeds."""

import sys

import pytest

from . import deliberate_data, deliberate_fetch, deliberate_session, fetch_story
from .play import play
from .rules import RULES
from .world import RuleBrokenError

SEEDS = 3000

OURS = deliberate_data.FAULTS + deliberate_session.FAULTS
PLAYED = [(fault, play) for fault in OURS] + [(fault, fetch_story.play) for fault in deliberate_fetch.FAULTS]


@pytest.mark.parametrize(("fault", "play"), PLAYED, ids=[fault.name for fault, _ in PLAYED])
def test_a_fault_is_found(fault, play, monkeypatch, capsys):
    fault.put(monkeypatch.setattr)
    earlier = set()
    for seed, error in broken_stories(play):  # noqa: B007 - it is told below
        if error.rule == fault.rule:
            break
        earlier.add(error.rule)
    else:
        pytest.fail(f"not one of {SEEDS} seeds breaks the rule {fault.rule}; broken were {sorted(earlier)}")
    with capsys.disabled():
        sys.stdout.write(f"\n{fault.name}: {seed + 1} seeds, {error}\n")


def broken_stories(play=play):
    """Yield (seed, what it broke) of all stories that do not end well."""
    for seed in range(SEEDS):
        try:
            play(seed)
        except RuleBrokenError as error:
            yield seed, error


def test_every_rule_is_broken_by_some_fault():
    assert {fault.rule for fault in OURS} == RULES


def test_a_broken_rule_tells_its_seed_and_its_story(monkeypatch):
    fault = next(fault for fault in OURS if fault.name == "plan-drops-the-last-extent")
    fault.put(monkeypatch.setattr)
    seed, error = next(broken_stories())
    told = "\n".join(error.__notes__)
    assert f"python -m tests.sim {seed}" in told
    assert "StartPush" in told
    assert len(told.splitlines()) > 20
