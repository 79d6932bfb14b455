"""A memory cgroup below this process's own, of whichever version the machine has, for processes that a test starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from postcopy.kernel import cgroups
from tests.lacking import lacking


@contextmanager
def memory_cgroup(limit: int) -> Iterator[tuple[Path, list[str]]]:
    """Make one that grants `limit` bytes; yield the file of its limit, and what goes before a command to run in it."""
    ours = {files: folder for folder, files in reversed([*cgroups._folders(cgroups.ROOT)])}
    for files, folder in ours.items():
        made = folder / f"postcopy-test-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            limiting = made / files.limit
            if limiting.exists():
                limiting.write_text(str(limit))
                yield limiting, ["sh", "-c", f'echo $$ >"{made}/cgroup.procs" && exec "$@"', "in-cgroup"]
                return
        finally:
            made.rmdir()
    lacking("no memory cgroup can be made below this process's own")
