"""Programs that are not ours and that tests drive: from the PATH, or as .ci/run unpacked them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.lacking import lacking

UNPACKED = Path(__file__).parent.parent / ".ci/debian"
FOLDERS = os.pathsep.join([os.environ.get("PATH", ""), *(str(UNPACKED / "usr" / one) for one in ("bin", "sbin"))])


def outside(name: str) -> str:
    """Return the path of a program; without it the test is skipped, or fails in CI."""
    found = shutil.which(name, path=FOLDERS)
    return found or lacking(f"{name} is neither installed nor unpacked below {UNPACKED}: .ci/run does that")


def say(name: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return how it ended and what it said."""
    command = [outside(name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)
