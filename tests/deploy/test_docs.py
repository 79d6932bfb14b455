"""The texts for users: the reference is what the commands say, and the tutorial does what it says."""

from __future__ import annotations

import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy import limits
from postcopy.pages.units import format_size
from tests.agent.agents import ROOT
from tests.deploy.transcript import play
from tests.lacking import lacking
from tests.programs import FOLDERS, outside, say

DOCS = ROOT / "deploy/docs"


def test_the_reference_is_what_the_commands_say() -> None:
    made = runpy.run_path(str(DOCS / "make_reference.py"))["reference"]()
    assert (DOCS / "reference.md").read_text() == made, "run: .venv/bin/python deploy/docs/make_reference.py"


@pytest.fixture
def no_hosts() -> Iterator[None]:
    """Take away what the tutorial makes of network namespaces, however far it came."""
    if say("ip", "netns", "list").returncode:
        lacking("network namespaces")
    yield
    for name in ("pc-a", "pc-b"):
        say("ip", "netns", "delete", name)


def test_the_tutorial_does_what_it_says(tmp_path: Path, no_hosts: None) -> None:
    """Its very commands, in their order, in shells as it has them; what they print has the shape that is shown."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POSTCOPY_")}
    environment |= {"PATH": FOLDERS, "LC_ALL": "C.UTF-8", "POSTCOPY_CONFIG": os.devnull}
    outside("promtool")
    assert play((DOCS / "tutorial.md").read_text(), tmp_path, environment) > 25
    assert list(tmp_path.iterdir()) == []  # it cleans up after itself


def test_a_step_that_prints_something_else_is_found(tmp_path: Path) -> None:
    environment = {"PATH": FOLDERS}
    text = "```console\n$ echo 5 apples in 3 ms\n{}\n$ cat <<'END'\nplain\nEND\nplain\n```\n"
    assert play(text.format("7 apples in 1.5 s"), tmp_path, environment) == 2
    assert play(text.format("…\n6 apples in 2 µs\n…"), tmp_path, environment) == 2
    for wrong in ("7 pears in 1.5 s", "7 apples in 1.5 s\nand more", "", "7 apples", "…\n7 pears\n…"):
        with pytest.raises(AssertionError, match="5 apples in 3 ms"):
            play(text.format(wrong), tmp_path, environment)
    with pytest.raises(AssertionError, match="status 1"):
        play("```console\n$ false\n```\n", tmp_path, environment)


def anchors(path: Path) -> set[str]:
    """Return what a link may name within a text: its headings, as forges write them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def texts() -> list[Path]:
    """Return every text of ours."""
    folders = (ROOT / "postcopy", ROOT / "agent", ROOT / "tests", ROOT / "deploy", ROOT / ".github")
    return [ROOT / "README.md", *sorted(path for folder in folders for path in folder.rglob("*.md"))]


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not link.startswith(("http://", "https://")):
            name, _, anchor = link.partition("#")
            there = (path.parent / name).resolve() if name else path
            if not there.exists() or (anchor and anchor not in anchors(there)):
                broken.append(link)
    assert broken == []


def test_the_limits_that_users_meet() -> None:
    """Their table says what the one file of limits does."""
    said = re.findall(r"^\| [^|]+ \| ([^|]+) \|", (DOCS / "limits.md").read_text(), re.MULTILINE)[1:]
    assert said == [
        f"{limits.REGIONS_MAX}",
        format_size(limits.PAGE_SIZE_MAX),
        f"{limits.GUEST_VCPUS_MAX}, {limits.KVM_VCPUS_MAX}",
        f"{format_size(limits.GUEST_PAGES_MAX * 4096)}, {format_size(limits.KVM_MEMORY_BYTES_MAX)}",
        format_size(limits.CONTROL_BYTES_MAX),
        "one of each agent",
        f"{limits.PROCESSES_MAX}, {format_size(limits.HAND_OVER_SIZE_MAX)}",
        f"{limits.OFFERED_SECONDS + limits.HEARD_OUT_SECONDS:g} s",
        f"{limits.ORIGINS_MAX}",
        f"{limits.HAND_OVER_BYTES_MAX} bytes, within {limits.HAND_OVER_SECONDS:g} s",
        f"{limits.DESTINATIONS_MAX}, with {format_size(limits.FETCHED_BYTES_MAX)} of buffers together",
        f"{limits.PUMP_VIEWS_MAX}",
        f"{limits.UNPROVEN_MAX}, for {limits.PREAMBLE_SECONDS:g} s",
        f"{limits.LOST_EXTENTS_MAX}",
        f"{limits.UNIX_PATH_BYTES_MAX} bytes",
    ]
