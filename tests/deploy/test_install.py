"""The two commands out of a checkout: what they say, in one line, on a host that lacks something."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.lacking import lacking

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


def run(host: Path, command: str, **options: Any) -> tuple[int, str]:
    ended = subprocess.run(
        ["/bin/sh", str(host / "deploy" / command), "--help"],
        env={"PATH": str(host / "bin"), "HOME": str(host)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        **options,
    )
    assert ended.stdout == ""
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("command", ["postcopy", "test", "wheel"])
def test_without_python(host: Path, command: str) -> None:
    assert run(host, command) == (3, "postcopy: Python 3.11 or newer is missing: apt-get install python3\n")


@pytest.mark.parametrize("command", ["postcopy", "test", "wheel"])
def test_an_old_python_is_none(host: Path, command: str) -> None:
    add_python(host, "exit 1")
    assert run(host, command) == (3, "postcopy: Python 3.11 or newer is missing: apt-get install python3\n")


@pytest.mark.parametrize("command", ["postcopy", "test", "wheel"])
def test_without_a_compiler(host: Path, command: str) -> None:
    add_python(host, "exit 0")
    assert run(host, command) == (3, "postcopy: a C compiler is missing: apt-get install gcc libc6-dev\n")


@pytest.mark.parametrize("command", ["postcopy", "test", "wheel"])
def test_without_headers(host: Path, command: str) -> None:
    add_python(host, f"echo {host}/include")
    (host / "bin/cc").symlink_to("/bin/true")
    status, text = run(host, command)
    assert status == 3
    assert text == (f"postcopy: Python's headers are missing ({host}/include/Python.h): apt-get install python3-dev\n")


def test_a_checkout_of_somebody_else_is_left_alone(host: Path) -> None:
    if os.geteuid() != 0:
        lacking("another user: only root can be one")
    add_python(host, f"echo {host}/include")
    (host / "include").mkdir()
    (host / "include/Python.h").touch()
    (host / "bin/cc").symlink_to("/bin/true")
    (host / "package/room").mkdir(parents=True)
    built_of = ("pyproject.toml", "setup.py", "package/limits.py")
    built_of += ("package/room/a.c", "package/room/a.cdef", "package/room/build.py")
    for name in built_of:
        (host / name).touch()
    theirs = host / ".venv/bin"
    theirs.mkdir(parents=True)
    for folder in (host, *host.parents):
        if folder.stat().st_uid == 0 and Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)
    status, text = run(host, "postcopy", user=65534)
    assert (status, text.count("\n")) == (3, 1), text
    assert text.startswith(f"postcopy: {host} is not yours to write and not built, or out of date")
    assert theirs.is_dir()
