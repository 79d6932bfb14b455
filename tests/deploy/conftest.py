"""The packages that `deploy/wheel` makes, made once for all tests that install or unpack them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.agent.agents import ROOT


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("packages")
    done = subprocess.run([ROOT / "deploy/wheel", folder], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    wheel, sdist = (Path(line) for line in sorted(done.stdout.splitlines(), reverse=True) if line)
    return (wheel, sdist) if wheel.suffix == ".whl" else (sdist, wheel)
