"""What the memory cgroups that this process is in, of either version, still leave it.

In: /proc/self/cgroup, /proc/self/mountinfo and the files of the mounted hierarchies. Out: bytes, limit by limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class _Files:
    """How a version calls its files, and what in memory.stat is page cache of a cgroup and all below it."""

    limit: str
    usage: str
    droppable: tuple[str, ...]


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def memory_left(root: Path = ROOT) -> list[tuple[int, str]]:
    """Return how many bytes each cgroup with a limit, from this process's up, has left, and the file that limits it.

    Page cache counts as left: it can be dropped. `root` is where /proc and the mounts are looked for.
    """
    found = []
    for folder, files in _folders(root):
        try:
            limit = (folder / files.limit).read_text(encoding="utf-8").strip()
            if limit != "max":
                used = int((folder / files.usage).read_text(encoding="utf-8"))
                left = int(limit) - used + _droppable(folder, files)
                found.append((max(left, 0), str(folder / files.limit)))
        except OSError:
            pass  # no memory controller at this level
    return found


def _folders(root: Path) -> Iterator[tuple[Path, _Files]]:
    """Yield the folder of each cgroup of this process that may limit memory, up to where its hierarchy is mounted."""
    try:
        cgroups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    ours = {}
    for line in cgroups:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            ours[_V2] = Path(path)
        elif "memory" in controllers.split(","):
            ours[_V1] = Path(path)
    for line in mounts:
        mount, _, filesystem = line.partition(" - ")
        top, place = mount.split()[3:5]
        kind, *_, options = filesystem.split()
        files = _V2 if kind == "cgroup2" else _V1 if kind == "cgroup" and "memory" in options.split(",") else None
        # A mount of another part of the hierarchy has nothing to say of this process.
        if files in ours and ours[files].is_relative_to(top):
            below = ours[files].relative_to(top)
            folder = root / place.lstrip("/")
            yield from ((folder / part, files) for part in (below, *below.parents))


def _droppable(folder: Path, files: _Files) -> int:
    counts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    return sum(int(counts.get(name, 0)) for name in files.droppable)
