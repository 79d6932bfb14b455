"""C without Python, under the compiler's sanitizers: no race, no leak, no overrun in pump, guest and bench."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from postcopy import limits
from postcopy.kernel.kvm import probe_kvm
from tests.lacking import lacking

ROOT = Path(__file__).parents[2]
ROOMS = [ROOT / "postcopy/pump", ROOT / "postcopy/guest"]
SOURCES = [source for room in ROOMS for source in sorted(room.glob("[!_]*.c"))]
FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing", "-pthread"]
FLAGS += [f"-I{room}" for room in ROOMS]
FLAGS += [f"-D{name}={value}" for name, value in limits.macros(limits.PUMP_IN_C + limits.GUEST_IN_C)]
ENVIRONMENT = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}


def compile_to(command: list[str], program: Path) -> Path:
    subprocess.run([*command, "-o", str(program)], check=True, timeout=100)
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, timeout=100, check=False, env=ENVIRONMENT
    )


@pytest.fixture(scope="module", params=["address,leak", "undefined", "thread"])
def compiler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command that compiles with one sanitizer, known to work here."""
    name = shutil.which(os.environ.get("CC", "cc"))
    assert name, "the build needed a C compiler as well"
    command = [name, *FLAGS, f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    folder = tmp_path_factory.mktemp("native")
    (folder / "empty.c").write_text("int main(void) { return 0; }")
    try:
        # Some compilers lack the library, and some of these libraries do not start under a kernel's address layout.
        works = run(compile_to([*command, str(folder / "empty.c")], folder / "empty")).returncode == 0
    except subprocess.CalledProcessError:
        works = False
    if not works:
        lacking(f"-fsanitize={request.param} does not work")
    return command


@pytest.fixture(scope="module")
def migrate(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program that migrates, compiled once for all its ways."""
    program = [*compiler, str(Path(__file__).with_name("migrate.c")), *map(str, SOURCES)]
    return compile_to(program, tmp_path_factory.mktemp("native") / "migrate")


WAYS = ["copy", "continue", "move", "remove", "view", "copy tls", "continue tls"]
WAYS += ["cut-copy", "cut-continue", "cut-copy tls"]


@pytest.mark.parametrize("way", WAYS)
def test_a_migration_is_clean(migrate: Path, way: str) -> None:
    way, *tls = way.split()
    ended = run(migrate, way, "4096", "6000", *tls)
    assert ended.returncode == 0, ended.stderr
    assert "4096 pages checked, 0 mismatched" in ended.stdout
    demand = int(ended.stdout.split("demand ")[1].split(",")[0])
    assert demand > 0, "no fault met the push: this proved nothing"


def test_a_guest_of_kvm_is_clean(compiler: list[str], tmp_path: Path) -> None:
    refusal = probe_kvm().refusal
    if refusal is not None:
        lacking(refusal)
    program = [*compiler, str(Path(__file__).with_name("kvm.c")), *map(str, SOURCES)]
    ended = run(compile_to(program, tmp_path / "kvm"))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ok\n", "")


def test_who_asks_for_metrics_is_clean(compiler: list[str], tmp_path: Path) -> None:
    bench = ROOT / "agent/bench"
    program = [*compiler, f"-I{bench}", str(Path(__file__).with_name("asker.c")), str(bench / "asker.c")]
    ended = run(compile_to(program, tmp_path / "asker"))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ok\n", "")


def test_a_guest_is_clean(compiler: list[str], tmp_path: Path) -> None:
    program = [*compiler, str(Path(__file__).with_name("guest.c")), *map(str, SOURCES)]
    ended = run(compile_to(program, tmp_path / "guest"))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ok\n", "")
