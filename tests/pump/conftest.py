"""A kernel whose mappings change for as long as a test likes, for its child processes: see changing.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


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
