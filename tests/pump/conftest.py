"""Sources to stand in front of; for child processes, a kernel whose mappings change as a test likes (changing.py)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pump.source_stage import Source


@pytest.fixture(scope="module")
def changing_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library, built."""
    library = tmp_path_factory.mktemp("changing") / "changing.so"
    source = Path(__file__).with_name("changing.c")
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True, timeout=60)
    return library


@pytest.fixture
def changing_kernel(changing_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give it to the children of this test."""
    monkeypatch.setenv("LD_PRELOAD", str(changing_library))


@pytest.fixture(params=["mapped", "read"])
def make(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Make sources of a guest's mapping, and of a file that is read."""
    made: list[Source] = []

    def source(*args: Any, **options: Any) -> Source:
        made.append(Source(*args, read=request.param == "read", **options))
        return made[-1]

    yield source
    for one in made:
        one.close()
