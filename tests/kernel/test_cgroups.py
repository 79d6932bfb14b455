"""What memory cgroups leave a process: of either version, however far up the limit is, wherever they are mounted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from postcopy.kernel.cgroups import memory_left
from tests.memory_cgroup import memory_cgroup

MIB = 1 << 20
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = ("memory.max", "memory.current", "")
NONE_V1 = 9223372036854771712
ROOTS = "21 1 0:20 / /proc rw - proc proc rw\n"
MOUNT_V1 = "35 31 0:32 {} /cg/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
MOUNT_V2 = "41 31 0:38 {} /cg/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_OTHER = "32 31 0:29 / /cg/cpu rw,relatime - cgroup cgroup rw,cpu\n"


@pytest.fixture
def machine(tmp_path):
    """Return functions that say in which cgroups this process is and what is mounted, and that limit a cgroup."""
    (tmp_path / "proc/self").mkdir(parents=True)

    def within(cgroup, mountinfo):
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        (tmp_path / "proc/self/mountinfo").write_text(ROOTS + mountinfo)

    def limit(path, version, maximum, used, inactive=0, active=0):
        maximum_file, used_file, prefix = version
        folder = tmp_path / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / maximum_file).write_text(f"{maximum}\n")
        (folder / used_file).write_text(f"{used}\n")
        stat = f"anon 1\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\n"
        (folder / "memory.stat").write_text(stat)

    return within, limit


def left(root):
    """Return what is left, by the file below the root."""
    return {file.removeprefix(f"{root}/"): left for left, file in memory_left(root)}


@pytest.mark.parametrize(
    ("version", "cgroup", "mount", "place", "no_limit"),
    [(V1, "4:memory:", MOUNT_V1, "cg/memory", NONE_V1), (V2, "0::", MOUNT_V2, "cg/unified", "max")],
    ids=["v1", "v2"],
)
def test_each_limit_on_the_way_up_is_found_and_page_cache_counts_as_left(
    machine, tmp_path, version, cgroup, mount, place, no_limit
):
    within, limit = machine
    within(f"2:cpu:/other\n{cgroup}/a/b\n", MOUNT_OTHER + mount.format("/"))
    limit(f"{place}/a/b", version, 300 * MIB, 100 * MIB, inactive=30 * MIB, active=20 * MIB)
    limit(f"{place}/a", version, 200 * MIB, 260 * MIB)
    limit(place, version, no_limit, 0)
    limit("cg/cpu/other", version, 1, 0)
    limit(f"{place}/c", version, 1, 0)
    found = left(tmp_path)
    assert found[f"{place}/a/b/{version[0]}"] == 250 * MIB
    assert found[f"{place}/a/{version[0]}"] == 0
    assert min(found.values()) == 0
    assert {file for file, size in found.items() if size < 1 << 40} == {
        f"{place}/{folder}/{version[0]}" for folder in ("a/b", "a")
    }


def test_both_versions_are_looked_at_where_both_are_mounted(machine, tmp_path):
    within, limit = machine
    within("4:name=memory:/x\n3:cpu,memory:/a\n0::/b\n", MOUNT_V1.format("/") + MOUNT_V2.format("/"))
    limit("cg/memory/a", V1, 8 * MIB, MIB)
    limit("cg/unified/b", V2, 5 * MIB, MIB)
    assert left(tmp_path) == {"cg/memory/a/memory.limit_in_bytes": 7 * MIB, "cg/unified/b/memory.max": 4 * MIB}


@pytest.mark.parametrize(("path", "top"), [("/", "/"), ("/pod/box", "/pod/box")], ids=["namespace", "bind mount"])
def test_in_a_container_the_limit_is_where_the_hierarchy_is_mounted(machine, tmp_path, path, top):
    within, limit = machine
    within(f"0::{path}\n", MOUNT_V2.format(top))
    limit("cg/unified", V2, 8 * MIB, MIB)
    assert left(tmp_path) == {"cg/unified/memory.max": 7 * MIB}
    within(f"0::{Path(path, 'inner')}\n", MOUNT_V2.format(top))
    limit("cg/unified/inner", V2, 4 * MIB, MIB)
    assert left(tmp_path) == {"cg/unified/inner/memory.max": 3 * MIB, "cg/unified/memory.max": 7 * MIB}


def test_what_is_mounted_of_others_limits_nobody_here(machine, tmp_path):
    within, limit = machine
    within("0::/pod\n", MOUNT_V2.format("/other"))
    limit("cg/unified", V2, 1, 0)
    assert memory_left(tmp_path) == []


def test_a_machine_without_cgroups_limits_nothing(machine, tmp_path):
    assert memory_left(tmp_path) == []
    within, _ = machine
    within("0::/a\n", MOUNT_V2.format("/"))  # whose cgroup is gone
    assert memory_left(tmp_path) == []


TAKING = """
import json, mmap
from agent.bench.machine import available_bytes
from postcopy.kernel.cgroups import memory_left
before = memory_left()[0], available_bytes()
with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
    memory.madvise(23)  # MADV_POPULATE_WRITE
    print(json.dumps([before, memory_left()[0], available_bytes()]))
"""


def test_the_kernels_own_limit_and_what_is_taken_below_it():
    with memory_cgroup(200 * MIB) as (limit, prefix):
        command = [*prefix, sys.executable, "-c", TAKING]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    (before, had), after, has = json.loads(told)
    assert before[1] == after[1] == str(limit)
    assert 100 * MIB < before[0] < 200 * MIB
    assert before[0] - after[0] > 60 * MIB  # what is charged is told in batches
    assert had <= before[0] + MIB
    assert has <= after[0] + MIB
