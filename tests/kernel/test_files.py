"""Guest memory in files: found by the filesystem they lie on, trapped and placed as memory without a name is."""

import os
import stat
from pathlib import Path

import pytest

from postcopy.errors import HostError, UsageError
from postcopy.kernel import MEMORY_TYPES, Outcome, Userfaultfd, calls, memory_type, memory_type_at, memory_types_in
from postcopy.kernel.files import type_at
from postcopy.pages.regions import Region
from tests.kernel.bodies import PAGE, open_descriptors
from tests.kernel.memory import PLAIN
from tests.lacking import lacking

HUGE = 1 << 21


@pytest.fixture
def tmpfs(mount):
    return mount("tmpfs", "size=1M")


@pytest.fixture
def hugetlbfs(mount, huge_pages):
    huge_pages("hugetlb-2M", 4)
    return mount("hugetlbfs", "pagesize=2M,size=6M")


def places_pages(kind, pages):
    """Allocate memory of that type and place one page of it in either way; return its mapping, still open."""
    region = Region(0, kind.name, kind.page_size, pages * kind.page_size)
    mapping = kind.allocate(region)
    with Userfaultfd.open(optional=PLAIN) as uffd:
        uffd.register(mapping.address, region.size, kind.modes_for(alias=True))
        calls.write_memory(mapping.alias, b"alias")
        assert uffd.continue_(mapping.address, kind.page_size).outcome is Outcome.PLACED
        content = b"c" * kind.page_size
        assert uffd.copy(mapping.address + kind.page_size, content).outcome is Outcome.PLACED
        assert calls.read_memory(mapping.address, 5) == b"alias"
        assert calls.read_memory(mapping.address + kind.page_size, kind.page_size) == content
    return mapping


def test_a_directory_holds_files_without_a_name(tmpfs):
    kind = memory_type_at("tmpfs", tmpfs)
    assert (kind.name, kind.page_size) == ("tmpfs", PAGE)
    with places_pages(kind, 4) as mapping:
        assert os.fstat(mapping.fd).st_dev == tmpfs.stat().st_dev
        assert list(tmpfs.iterdir()) == []
        assert [length for _, length in mapping.data_extents()] == [2 * PAGE]
    assert os.statvfs(tmpfs).f_bfree == os.statvfs(tmpfs).f_blocks


def test_a_named_file_is_made_for_its_owner_alone_and_goes_with_its_mapping(tmpfs):
    name = tmpfs / "guest"
    with places_pages(memory_type_at("tmpfs", name), 4):
        assert stat.S_IMODE(name.stat().st_mode) == 0o600
        assert name.read_bytes()[:5] == b"alias"
    assert not name.exists()


@pytest.mark.parametrize("change", ["replaced", "linked", "gone"])
def test_a_file_that_somebody_else_put_there_is_not_removed(tmpfs, change):
    name = tmpfs / "guest"
    with memory_type_at("tmpfs", name).allocate(Region(0, "tmpfs", PAGE, PAGE)):
        name.rename(tmpfs / "ours")
        if change == "replaced":
            name.write_text("another's")
        elif change == "linked":
            name.symlink_to("ours")
    assert sorted(file.name for file in tmpfs.iterdir()) == (["ours"] if change == "gone" else ["guest", "ours"])
    if change == "replaced":
        assert name.read_text() == "another's"


def test_a_directory_that_has_gone_does_not_become_a_file(tmpfs):
    folder = tmpfs / "folder"
    folder.mkdir()
    kind = memory_type_at("tmpfs", folder)
    folder.rmdir()
    with pytest.raises(HostError, match="folder: No such file or directory"):
        kind.allocate(Region(0, "tmpfs", PAGE, PAGE))
    assert list(tmpfs.iterdir()) == []


def test_a_directory_in_place_of_a_name_takes_no_file(tmpfs):
    kind = memory_type_at("tmpfs", tmpfs / "guest")
    (tmpfs / "guest").mkdir()
    with pytest.raises(HostError, match="guest: File exists"):
        kind.allocate(Region(0, "tmpfs", PAGE, PAGE))


def test_a_name_that_is_taken_may_be_another_guest(tmpfs):
    name = tmpfs / "guest"
    name.write_text("another's")
    before = open_descriptors()
    with pytest.raises(HostError, match=r"guest: File exists"):
        memory_type_at("tmpfs", name).allocate(Region(0, "tmpfs", PAGE, PAGE))
    assert name.read_text() == "another's"
    assert open_descriptors() == before


def test_the_page_size_of_hugetlbfs_is_the_mounts(hugetlbfs):
    kind = memory_type_at("hugetlbfs", hugetlbfs / "guest")
    assert (kind.name, kind.page_size) == ("hugetlbfs-2M", HUGE)
    assert memory_type_at("hugetlbfs-2M", hugetlbfs).page_size == HUGE
    before = kind.pool()
    with places_pages(kind, 2):
        assert (hugetlbfs / "guest").stat().st_size == 2 * HUGE
    assert not (hugetlbfs / "guest").exists()
    assert kind.pool() == before
    with pytest.raises(UsageError, match="holds memory of type hugetlbfs-2M, not hugetlbfs-1G"):
        memory_type_at("hugetlbfs-1G", hugetlbfs)


def test_the_mounts_own_limit_counts(tmpfs, hugetlbfs):
    for folder, size in ((tmpfs, 1 << 20), (hugetlbfs, 3 * HUGE)):
        kind = type_at(folder)
        kind.check_room(size)
        with pytest.raises(HostError, match=f"asked for, .* {folder}"):
            kind.check_room(size + kind.page_size)
    with pytest.raises(HostError, match=r"1 MiB .* available by"):
        type_at(tmpfs).allocate(Region(0, "tmpfs", PAGE, 2 << 20))


@pytest.mark.parametrize(
    ("name", "place", "text"),
    [
        ("tmpfs", "/proc", "/proc lies on proc: guest memory is kept in files of tmpfs or hugetlbfs only"),
        ("tmpfs", "/nowhere/at/all", "/nowhere/at/all: no directory"),
        ("tmpfs", "relative", "relative: no directory"),
        ("tmpfs", None, "memory tmpfs needs a place"),
        ("hugetlbfs", None, "memory hugetlbfs needs a place"),
        ("shmem", "/dev/shm", "memory shmem has no place in the file system: /dev/shm"),
        ("anonymous", "/dev/shm", "memory anonymous has no place"),
        ("floppy", None, "unknown memory type 'floppy': known are .*tmpfs"),
    ],
)
def test_what_does_not_go_together_is_said(name, place, text):
    with pytest.raises(UsageError, match=text):
        memory_type_at(name, Path(place) if place else None)


def test_a_name_and_another_filesystem(tmpfs):
    with pytest.raises(UsageError, match=f"{tmpfs} holds memory of type tmpfs, not hugetlbfs"):
        memory_type_at("hugetlbfs", tmpfs)


def test_types_without_a_place_are_memfds(huge_pages):
    huge_pages("hugetlb-2M", 2)
    for name in ("tmpfs", "hugetlbfs-2M"):
        with places_pages(memory_type(name), 2) as mapping:
            assert "memfd:" in str(Path(f"/proc/self/fd/{mapping.fd}").readlink())


def test_a_destinations_mounts_take_the_memory_of_their_type(tmpfs, hugetlbfs):
    types = memory_types_in([tmpfs, hugetlbfs])
    assert list(types) == list(MEMORY_TYPES)
    assert (types["tmpfs"].place, types["hugetlbfs-2M"].place) == (tmpfs, hugetlbfs)
    assert types["shmem"] is MEMORY_TYPES["shmem"]
    assert MEMORY_TYPES["tmpfs"].place is None
    with pytest.raises(UsageError, match="name is no directory"):
        memory_types_in([tmpfs / "name"])


def test_a_tmpfs_of_huge_pages_stays_small_at_a_destination(mount):
    folder = mount("tmpfs", "size=16M,huge=always")
    if "huge=always" not in Path("/proc/self/mounts").read_text():
        lacking("this kernel has no huge pages for tmpfs")
    with type_at(folder).allocate(Region(0, "tmpfs", PAGE, 4 * HUGE)) as mapping:
        calls.write_memory(mapping.alias + HUGE, b"w")
        assert [length for _, length in mapping.data_extents()] == [PAGE]
    with type_at(folder).allocate(Region(0, "tmpfs", PAGE, 4 * HUGE), alias=False) as mapping:
        calls.write_memory(mapping.address + HUGE, b"w")
        assert [length for _, length in mapping.data_extents()] == [HUGE]
