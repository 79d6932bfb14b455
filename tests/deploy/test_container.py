"""A guest migrates inside a container, between agents that are nobody and have one device; how the image is made."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.agents import ROOT
from tests.deploy.container import DEVICE, USER, Container
from tests.lacking import lacking
from tests.programs import say

CONTAINERFILE = ROOT / "deploy/container/Containerfile"


@pytest.fixture(scope="module")
def container(packages: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    if not DEVICE.exists():
        lacking(f"{DEVICE} is not there")
    unpacked = tmp_path_factory.mktemp("wheel") / "unpacked"  # which nobody else may read, unlike what is in it
    shutil.unpack_archive(packages[0], unpacked, "zip")
    return Container(tmp_path_factory.mktemp("container"), unpacked)


def test_a_guest_migrates_with_nothing_but_the_device(container: Container) -> None:
    done = container.run("demo", "--size", "32MiB", "--json")
    assert done.status == 0, done.err
    assert done.json["outcome"] == "completed"
    assert done.json["integrity"]["pages_mismatched"] == 0
    assert done.json["integrity"]["pages_checked"] == 8192
    assert done.json["fault_latency_seconds"]["count"] > 0


def test_the_doctor_sees_which_way_is_open(container: Container) -> None:
    done = container.run("doctor", "--json", "--need", "shmem:minor")
    assert done.status == 0, done.err
    refusals = {way["by"]: way["refusal"] for way in done.json["userfaultfd"]["ways"]}
    assert refusals.pop("/dev/userfaultfd") is None
    assert all("EPERM" in refusal for refusal in refusals.values()), refusals


def test_without_the_device_it_says_what_is_missing(container: Container) -> None:
    done = container.run("destination", device=False)
    assert done.status == 3
    assert "/dev/userfaultfd" in done.err.strip().splitlines()[-1]


def test_the_containerfile_is_sound() -> None:
    done = say("hadolint", "--failure-threshold", "info", CONTAINERFILE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_runs_as_nobody_and_is_made_of_what_is_locked() -> None:
    text = CONTAINERFILE.read_text()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == [f"{USER}:{USER}"]
    assert "--require-hashes -r deploy/requirements.txt" in text
    last = text[text.rindex("FROM ") :]
    assert "gcc" not in last
    for source in re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE):
        assert (ROOT / source).exists()
    ignored = Path(ROOT / ".containerignore").read_text().split()
    assert {".git", ".venv", "**/*.so"} <= set(ignored)
