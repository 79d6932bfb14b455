"""The link of a known rate: it is there while the block lasts, and gone afterwards whatever happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.bench.link import _PREFIX, link, remove_left_behind
from postcopy.errors import HostError
from tests.lacking import lacking


@pytest.fixture(autouse=True)
def _root():
    if os.geteuid() != 0:
        lacking("network namespaces are root's")


def left():
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.glob(f"{_PREFIX}{os.getpid()}*")) if folder.exists() else []


def made():
    try:
        return link()
    except HostError as error:
        lacking(str(error))


def test_both_ends_reach_each_other_at_the_rate_and_are_taken_away():
    with made() as ends:
        assert left() == sorted([ends.source, ends.destination])
        shown = subprocess.run(
            ["tc", "-n", ends.source, "qdisc", "show", "dev", "s0"], capture_output=True, text=True, check=True
        )
        assert "tbf" in shown.stdout
        assert "1Gbit" in shown.stdout
        route = subprocess.run(
            ["ip", "-n", ends.source, "route", "get", ends.host], capture_output=True, text=True, check=True
        )
        assert "dev s0" in route.stdout
    assert left() == []


def test_an_error_inside_takes_them_away_too():
    with pytest.raises(KeyboardInterrupt), made():
        raise KeyboardInterrupt
    assert left() == []


def test_what_a_killed_bench_left_is_removed():
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    name = f"{_PREFIX}{int(ended.stdout)}s"
    subprocess.run(["ip", "netns", "add", name], check=True)
    with made() as ends:
        assert not Path("/run/netns", name).exists()
        remove_left_behind()
        assert Path("/run/netns", ends.source).exists(), "one's own is not left behind"
