"""Which scenarios there are, which of them run on which machine, and how they are named on a command line."""

from __future__ import annotations

import pytest

from agent.bench.scenarios import GIB, HUGE, HUGE_PAGES, Machine, catalogue, choose
from postcopy.errors import UsageError

ROOMY = Machine(available=64 * GIB, huge_pages=1024)


def names(scenarios):
    return [one.name for one in scenarios]


def test_names_are_unique_and_targets_refer_to_scenarios_that_exist():
    scenarios = catalogue(ROOMY)
    assert len(set(names(scenarios))) == len(scenarios)
    referred = {target.of for one in scenarios for target in one.targets} - {None, "floor"}
    assert referred <= set(names(scenarios))


def test_each_scenario_is_about_the_figures_of_its_targets_and_its_choice():
    for one in catalogue(ROOMY):
        assert {target.figure for target in one.targets} <= set(one.figures), one.name
        assert not one.floors or set(one.by) <= set(one.figures), one.name


def test_all_three_modes_of_both_kinds_of_memory_are_measured():
    for group in ("demand", "mixed", "stream"):
        found = [name for name in names(catalogue(ROOMY)) if name.startswith(f"{group}/")]
        assert found == [
            f"{group}/{memory}/{mode}" for memory in ("shmem", "hugetlb-2M") for mode in ("auto", "minor", "missing")
        ]


def test_a_floor_does_the_work_of_its_product():
    for one in catalogue(ROOMY):
        for floor in one.floors.values():
            assert floor.size == one.product.size
            assert floor.page_size == (HUGE if one.product.memory in {"hugetlb-2M", "hugetlbfs-2M"} else 4096)
            assert floor.anonymous == (one.product.memory == "anonymous")
            assert floor.framed().size % floor.framed().frame_bytes == 0
            assert (floor.push != "none") == one.product.push
            assert floor.touchers in {0, one.product.vcpus}


def test_every_memory_type_is_a_row():
    from postcopy.kernel import MEMORY_TYPES

    found = {(one.product.memory, one.product.mode) for one in catalogue(ROOMY)}
    assert {memory for memory, _ in found} == set(MEMORY_TYPES) - {"guest_memfd", "hugetlbfs-1G"}
    assert {("anonymous", "auto"), ("anonymous", "move"), ("hugetlb-1G", "minor"), ("hugetlb-1G", "missing")} <= found
    assert {one.product.mode for one in catalogue(ROOMY) if one.product.thp} == {"auto", "minor", "missing"}


def test_what_a_type_lacks_comes_with_its_command(monkeypatch, tmp_path):
    from agent.bench import memory_types

    (tmp_path / "shmem_enabled").write_text("always within_size advise [never] deny force\n")
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    (tmp_path / "mounts").write_text("none /run/shm tmpfs rw 0 0\nnone /mnt hugetlbfs rw,pagesize=1024M 0 0\n")
    monkeypatch.setattr(memory_types, "THP", tmp_path)
    monkeypatch.setattr(memory_types, "MOUNTS", tmp_path / "mounts")
    lacking = {row.name: row.lacking for row in memory_types.rows(64 * GIB)}
    assert lacking["shmem-thp/auto"].endswith(f"says never: echo advise > {tmp_path / 'shmem_enabled'}")
    assert lacking["shmem-always/auto"].endswith(f"says never: echo always > {tmp_path / 'shmem_enabled'}")
    assert lacking["anonymous-thp/auto"] is None
    assert lacking["tmpfs/auto"] == "no tmpfs is mounted at /dev/shm"
    assert "mount -t hugetlbfs -o pagesize=2M" in lacking["hugetlbfs-2M/auto"]
    (tmp_path / "mounts").write_text("none /dev/shm tmpfs rw 0 0\nnone /mnt hugetlbfs rw,pagesize=2M 0 0\n")
    products = {row.name: row.product for row in memory_types.rows(64 * GIB)}
    assert (products["tmpfs/auto"].folder, products["hugetlbfs-2M/auto"].folder) == ("/dev/shm", "/mnt")
    (tmp_path / "shmem_enabled").write_text("[always] within_size advise never deny force\n")
    rows = {row.name: row for row in memory_types.rows(64 * GIB)}
    assert rows["shmem-thp/minor"].lacking is rows["shmem-always/auto"].lacking is None
    assert (rows["shmem-thp/auto"].product.thp, rows["shmem-always/auto"].product.thp) == (True, False)


def test_patterns_choose_in_the_order_of_the_table():
    scenarios = catalogue(ROOMY)
    assert names(choose(scenarios, ["stream/*/auto", "demand/shmem"], quick=False)) == [
        "demand/shmem/auto",
        "demand/shmem/minor",
        "demand/shmem/missing",
        "stream/shmem/auto",
        "stream/hugetlb-2M/auto",
    ]
    assert names(choose(scenarios, ["link"], quick=True)) == ["link"]
    assert len(choose(scenarios, [], quick=False)) == len(scenarios)
    assert 5 < len(choose(scenarios, [], quick=True)) < 16
    with pytest.raises(UsageError, match=r"'strem'.*demand, mixed, stream"):
        choose(scenarios, ["strem"], quick=False)


def test_a_machine_says_what_it_lacks():
    small = {one.name: one.lacking for one in catalogue(Machine(available=3 * GIB, huge_pages=0))}
    assert small["demand/shmem/auto"] is None
    assert small["sparse"] is None, "holes need no memory"
    assert "0 huge pages of 2 MiB are free" in small["stream/hugetlb-2M/auto"]
    assert "--reserve-huge-pages" in small["stream/hugetlb-2M/auto"]
    assert small["size/8GiB"].startswith("3 GiB of memory are available")


def test_huge_pages_are_shared_with_others():
    for free in (16, 256, 4096):
        for one in catalogue(Machine(64 * GIB, free)):
            if one.product.memory == "hugetlb-2M":
                assert one.lacking is None
                assert 2 * one.product.size <= free * HUGE
                assert one.product.size <= GIB
    whole = catalogue(Machine(64 * GIB, HUGE_PAGES))
    assert max(one.product.size for one in whole if one.product.memory == "hugetlb-2M") == GIB
