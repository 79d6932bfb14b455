"""The C of the pump and of the guest under the sanitizers: a migration without Python, built three ways."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "postcopy/pump").glob("[!_]*.c")), *sorted((ROOT / "postcopy/guest").glob("[!_]*.c"))]
SANITIZERS = {"address": ["address", "leak"], "undefined": ["undefined"], "thread": ["thread"]}


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    assert compiler
    path = tmp_path_factory.mktemp("native") / f"migrate-{request.param}"
    sanitize = ",".join(SANITIZERS[request.param])
    command = [compiler, "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing"]
    command += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-o", str(path)]
    command += [f"-I{ROOT / 'postcopy/pump'}", f"-I{ROOT / 'postcopy/guest'}"]
    command += [str(ROOT / "tests/native/migrate.c"), *map(str, SOURCES), "-lpthread"]
    subprocess.run(command, check=True, timeout=100)
    return path


@pytest.mark.parametrize("way", ["copy", "continue"])
def test_a_migration_is_clean(program: Path, way: str) -> None:
    result = subprocess.run(
        [str(program), way, "4096", "6000"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"},
    )
    assert result.returncode == 0, result.stderr
    assert "4096 pages checked, 0 mismatched" in result.stdout
    demand = int(result.stdout.split("demand ")[1].split(",")[0])
    assert demand > 0, "no fault met the push: this proved nothing"
