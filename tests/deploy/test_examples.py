"""The examples of the library, as programs of their own: they run, say what they promise, and use public names only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agent.agents import ENVIRONMENT

EXAMPLES = Path(__file__).parents[2] / "deploy/examples"
PUBLIC = {"postcopy.errors", "postcopy.kernel", "postcopy.link", "postcopy.pages"}
SECONDS = 60


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Run an example in a process that ends with the block, whatever it waits for."""
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / command[0], *command[1:]],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> str:
    """Return what it said until its end, which is a good one."""
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (0, "")
    return out


def said(*command: str) -> str:
    with started(*command) as process:
        return ended(process)


def test_minor_faults_are_served() -> None:
    assert said("serve_minor_faults.py") == "abcdefghijklmnop\n16 faults were served\n"


def test_dirty_pages_are_found() -> None:
    assert said("track_dirty_pages.py") == "written: [3, 4, 5]\nwritten: [5, 60]\nwritten: []\n"


def test_a_migration_of_ones_own_memory() -> None:
    with started("migrate_own_memory.py", "destination") as destination:
        assert destination.stdout is not None
        address = destination.stdout.readline().strip()
        left = re.match(
            r"(\d+) steps here, downtime [\d.]+ ms\n\d+ pages ", said("migrate_own_memory.py", "source", address)
        )
        arrived = re.fullmatch(
            r"the guest is at step (\d+), and so many are counted in its memory: (\d+)\n", ended(destination)
        )
        assert left is not None
        assert arrived is not None
        assert int(left[1]) < int(arrived[1]) == int(arrived[2])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_written_with_public_names(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("postcopy"):
            assert node.module in PUBLIC
    assert len(path.read_text().splitlines()) <= 110
    assert f'"{path.name}"' in Path(__file__).read_text(), "nobody runs it"
