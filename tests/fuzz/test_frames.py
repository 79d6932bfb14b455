"""What comes off a data connection, by libFuzzer with its sanitizers: the corpus again, then a while of something new.

The corpus is what fuzzing found so far, minimised. It grows by hand: README.md of this folder says how.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lacking import lacking
from tests.native.test_sanitizers import FLAGS, ROOT

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
CORPUS_BYTES_MAX = 1 << 20
SOURCES = sorted((ROOT / "postcopy/pump").glob("[!_]*.c"))
FUZZERS, SECONDS = 2, 22  # in CI, at once; test_python.py takes about as long as is missing to a minute of CPU
INPUT_BYTES_MAX = 768


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the fuzzer."""
    compiler = shutil.which("clang")
    if compiler is None:
        lacking("clang is not installed")
    built = tmp_path_factory.mktemp("fuzz") / "frames"
    command = [compiler, *FLAGS, "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    done = subprocess.run(
        [*command, str(HERE / "frames.c"), *map(str, SOURCES), "-o", str(built)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    if "libclang_rt" in done.stderr:
        lacking("clang's runtime (libclang-rt-dev) is not installed")
    assert done.returncode == 0, done.stderr
    return built


def fuzz(program: Path, *arguments: str | Path, seconds: float) -> str:
    """Run it; whatever ends it is shown, with the input that did so."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1"}
    done = subprocess.run(
        [program, "-timeout=25", f"-max_len={INPUT_BYTES_MAX}", *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env=environment,
        cwd=program.parent,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


def test_the_corpus_is_small_and_everything_in_it_still_comes_to_a_good_end(program: Path) -> None:
    inputs = sorted(CORPUS.iterdir())
    assert len(inputs) > 100
    assert sum(one.stat().st_size for one in inputs) < CORPUS_BYTES_MAX
    said = fuzz(program, "-runs=0", CORPUS, seconds=100)
    assert f"{len(inputs)} files found" in said


def test_a_while_of_fuzzing_finds_nothing(program: Path, tmp_path: Path) -> None:
    def one(number: int) -> int:
        found = tmp_path / f"found{number}"
        found.mkdir()
        said = fuzz(program, f"-max_total_time={SECONDS}", "-print_final_stats=1", found, CORPUS, seconds=110)
        return int(said.split("stat::number_of_executed_units:")[1].split()[0])

    with ThreadPoolExecutor(FUZZERS) as at_once:
        runs = list(at_once.map(one, range(FUZZERS)))
    assert min(runs) > 500, "it hardly ran: this proves nothing"
