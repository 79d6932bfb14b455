"""Programs that are not ours and that tests drive: from the PATH, beside this Python, or as .ci/run unpacked them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.lacking import lacking

UNPACKED = Path(__file__).parent.parent / ".ci/debian"
BESIDE = Path(sys.executable).parent
FOLDERS = os.pathsep.join(map(str, (os.environ.get("PATH", ""), BESIDE, UNPACKED / "usr/bin", UNPACKED / "usr/sbin")))


def outside(name: str) -> str:
    """Return the path of a program; without it the test is skipped, or fails in CI."""
    found = shutil.which(name, path=FOLDERS)
    return found or lacking(f"{name} is neither installed nor unpacked below {UNPACKED}: .ci/run does that")


def say(name: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return how it ended and what it said."""
    command = [outside(name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)
