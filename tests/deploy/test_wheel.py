"""The packages as somebody gets them: a wheel in an environment of its own, with no checkout anywhere near."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.agent.agents import ROOT

WRITTEN = ("*.py", "*.c", "*.h", "*.cdef", "*.pyi", "*.md", "*.toml", "*.yml", "*.yaml", "*.service")
SKIPPED = {".venv", ".git", ".ci", "build", "dist", ".hypothesis", ".pytest_cache"}


class Environment:
    """A virtual environment with nothing in it but the wheel and the locked packages, used from an empty folder."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.prefix = folder / "prefix"
        self.cwd = folder / "elsewhere"
        self.cwd.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.prefix], check=True)
        python = self.prefix / "bin/python"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", python]
        lock = ROOT / "deploy/requirements.txt"
        subprocess.run([*pip, "install", "--require-hashes", "-r", lock], check=True, cwd=self.cwd)
        subprocess.run([*pip, "install", "--no-deps", wheel], check=True, cwd=self.cwd)
        subprocess.run([*pip, "check"], check=True, cwd=self.cwd)

    def run(self, program: str, *arguments: Any) -> str:
        """Run an installed program as a user does who has never heard of the checkout; return what it prints."""
        fresh = {"HOME": str(self.cwd), "PATH": f"{self.prefix}/bin:/usr/bin:/bin", "POSTCOPY_CONFIG": os.devnull}
        done = subprocess.run(
            [self.prefix / "bin" / program, *map(str, arguments)],
            capture_output=True, text=True, check=False, timeout=60, env=fresh, cwd=self.cwd,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(packages: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("installed"), packages[0])


def test_it_is_what_was_installed(installed: Environment) -> None:
    where = installed.run("python", "-c", "import agent, postcopy; print(postcopy.__file__, agent.__file__)").split()
    assert [path for path in where if not path.startswith(str(installed.prefix))] == []
    version = re.search(r'version = "(.*)"', (ROOT / "pyproject.toml").read_text())
    assert version is not None
    assert installed.run("postcopy", "--version") == f"postcopy, version {version[1]}\n"


def test_it_knows_its_host(installed: Environment) -> None:
    found = json.loads(installed.run("postcopy", "doctor", "--json", "--need", "shmem:minor"))
    assert found["needs"][0]["met"]


def test_it_migrates_a_guest(installed: Environment) -> None:
    report = json.loads(installed.run("postcopy", "demo", "--size", "16MiB", "--json"))
    assert (report["outcome"], report["pages"]["total"]) == ("completed", 4096)
    assert report["integrity"] == {"page_size": 4096, "pages_checked": 4096, "pages_mismatched": 0}


def test_every_room_can_be_imported(installed: Environment) -> None:
    """Also what no command loads before it is needed: a module or a library that the wheel lacks would show here."""
    script = """
import importlib, pkgutil, agent, postcopy
for package in (postcopy, agent):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith((".__main__", ".build")) and not module.name.startswith("agent.report."):
            importlib.import_module(module.name)
"""
    assert installed.run("python", "-c", script) == ""


def test_what_operators_need_is_below_its_prefix(installed: Environment) -> None:
    share = installed.prefix / "share/postcopy"
    for folder in ("systemd", "prometheus", "prometheus/rules", "prometheus/tests", "grafana", "examples"):
        names = {path.name for path in (ROOT / "deploy" / folder).iterdir() if path.is_file()}
        assert {path.name for path in (share / folder).iterdir() if path.is_file()} == names
    out = installed.run("python", share / "examples/serve_minor_faults.py")
    assert out.endswith("16 faults were served\n")
    pages = {path.stem for path in (installed.prefix / "share/man/man1").iterdir()}
    assert {"postcopy", "postcopy-demo", "postcopy-config-check"} < pages
    demo = (installed.prefix / "share/man/man1/postcopy-demo.1").read_text()
    assert ".SH EXAMPLES\n.nf\n" in demo
    assert "\n\\&postcopy demo \\-\\-handover \\-\\-size 8GiB\n" in demo


def test_one_wheel_is_for_every_python_and_for_linux_with_this_glibc_or_a_newer(packages: tuple[Path, Path]) -> None:
    wheel, _ = packages
    assert re.fullmatch(r"postcopy-[\d.]+-cp311-abi3-manylinux_2_\d+_x86_64\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {Path(name).name for name in names if name.endswith(".so")} == {
        f"_{name}.abi3.so" for name in ("kernel", "pump", "guest", "floor")
    }
    assert [name for name in names if name.endswith((".c", ".h", ".cdef")) or name.startswith("tests/")] == []
    assert [name.rpartition("/")[2] for name in names if re.search(r"\.dist-info/licenses/.", name)] == ["LICENSE"]


def test_the_source_distribution_is_all_that_was_written(packages: tuple[Path, Path]) -> None:
    """The wheel was built out of it, so it builds; here: with the tests, and all that they read."""
    _, sdist = packages
    with tarfile.open(sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    written = {
        str(path.relative_to(ROOT)) for pattern in WRITTEN for path in ROOT.rglob(pattern)
        if not SKIPPED & set(path.relative_to(ROOT).parts) and not re.match(r"_\w+\.c$", path.name)
    }  # fmt: skip
    assert sorted(written - names) == []
    assert "LICENSE" in names
    assert [name for name in names if name.endswith((".so", ".pyc"))] == []
