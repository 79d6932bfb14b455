"""The guest's C under the compiler's sanitizers, without Python: no race, no leak, nothing out of bounds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUEST = ROOT / "postcopy" / "guest"
SOURCES = [
    Path(__file__).with_name("race.c"),
    *(GUEST / f"{name}.c" for name in ("check", "guest", "vcpu", "workload")),
]
FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-fno-sanitize-recover=all"]


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizer_has_nothing_to_say(sanitizer: str, tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    assert compiler, "the build needed a C compiler as well"
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }")
    command = [compiler, *FLAGS, f"-fsanitize={sanitizer}", "-o", str(tmp_path / "race")]
    for step in ([*command, str(probe)], [str(tmp_path / "race")]):
        # Some compilers lack the library, and some of these libraries do not start under some kernels' address layout.
        if subprocess.run(step, capture_output=True, check=False).returncode:
            pytest.skip(f"-fsanitize={sanitizer} does not work here: {' '.join(step)} failed")
    includes = [f"-I{GUEST}", f"-I{ROOT / 'postcopy' / 'pump'}"]
    subprocess.run([*command, *includes, *map(str, SOURCES)], check=True)
    run = subprocess.run([tmp_path / "race"], capture_output=True, text=True, timeout=100, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "ok\n", "")
