"""The two commands out of a checkout: what they say, in one line, on a host that lacks something."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ["sh", "dirname", "cat", "cksum", "tail", "ls", "rm", "mkdir"]


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A PATH with a shell and its tools, and a checkout that has never been installed."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(str(shutil.which(name)))
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    return tmp_path


def add_python(host: Path, text: str) -> None:
    """Put a python3 there that answers what the real one would, but for its headers."""
    python = host / "bin/python3"
    python.write_text(f"#!/bin/sh\n{text}\n")
    python.chmod(0o755)


def run(host: Path, command: str) -> tuple[int, str]:
    ended = subprocess.run(
        ["/bin/sh", str(host / "deploy" / command), "--help"],
        env={"PATH": str(host / "bin"), "HOME": str(host)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert ended.stdout == ""
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("command", ["postcopy", "test"])
def test_without_python(host: Path, command: str) -> None:
    assert run(host, command) == (3, "postcopy: Python 3.11 or newer is missing: apt-get install python3\n")


@pytest.mark.parametrize("command", ["postcopy", "test"])
def test_an_old_python_is_none(host: Path, command: str) -> None:
    add_python(host, "exit 1")
    assert run(host, command) == (3, "postcopy: Python 3.11 or newer is missing: apt-get install python3\n")


@pytest.mark.parametrize("command", ["postcopy", "test"])
def test_without_a_compiler(host: Path, command: str) -> None:
    add_python(host, "exit 0")
    assert run(host, command) == (3, "postcopy: a C compiler is missing: apt-get install gcc libc6-dev\n")


@pytest.mark.parametrize("command", ["postcopy", "test"])
def test_without_headers(host: Path, command: str) -> None:
    add_python(host, f"echo {host}/include")
    (host / "bin/cc").symlink_to("/bin/true")
    status, text = run(host, command)
    assert status == 3
    assert text == (f"postcopy: Python's headers are missing ({host}/include/Python.h): apt-get install python3-dev\n")
