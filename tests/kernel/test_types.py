"""Memory types: what they declare, how room is checked, and what it takes to add one."""

import os
from functools import partial

import pytest

from postcopy.errors import HostError, UsageError
from postcopy.kernel import MEMORY_TYPES, Feature, Ioctl, Mode, Outcome, Userfaultfd, Way, calls, memory_type
from postcopy.kernel import shmem as shmem_module
from postcopy.kernel.cgroups import memory_left
from postcopy.kernel.hugetlb import Hugetlb, Pool
from postcopy.kernel.memory_type import MemoryType
from postcopy.pages.regions import Region
from tests.kernel.bodies import PAGE
from tests.kernel.memory import PLAIN
from tests.lacking import lacking

HUGE = 1 << 21


def test_the_names_users_type():
    assert {name: known.page_size for name, known in MEMORY_TYPES.items()} == {
        "shmem": 4096,
        "hugetlb-2M": 1 << 21,
        "hugetlb-1G": 1 << 30,
        "anonymous": 4096,
        "tmpfs": 4096,
        "hugetlbfs-2M": 1 << 21,
        "hugetlbfs-1G": 1 << 30,
        "guest_memfd": 4096,
    }


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"'hugetlb'.*shmem, hugetlb-2M, hugetlb-1G"):
        memory_type("hugetlb")


SHARED = [name for name in MEMORY_TYPES if name not in {"anonymous", "guest_memfd"}]


@pytest.mark.parametrize("name", [*SHARED, "anonymous"])
def test_what_is_declared_is_granted(name):
    known = memory_type(name)
    grants = known.probe()
    if not grants.modes:
        lacking(grants.reason)
    for alias in (True, False):
        granted = grants.granted(known.modes_for(alias=alias))
        ways = [way for way in known.ways if way is not Way.CONTINUE or alias]
        assert known.ioctls_for(*ways) & ~granted == 0
        assert known.zero_way(alias=alias) in ways
    assert known.modes_for(alias=True) == (Mode.MISSING if name == "anonymous" else Mode.MISSING | Mode.MINOR)
    assert known.modes_for(alias=False) == Mode.MISSING


@pytest.mark.parametrize("name", SHARED)
def test_the_features_are_those_of_the_modes(name):
    known = memory_type(name)
    assert known.features_for(Mode.MISSING) in {Feature.MISSING_SHMEM, Feature.MISSING_HUGETLB}
    assert known.features_for(Mode.MISSING | Mode.MINOR) > known.features_for(Mode.MINOR) > Feature(0)
    assert known.features_for(Mode.WP) == Feature.WP | Feature.WP_HUGETLB_SHMEM


def test_a_way_that_the_type_has_not_got_is_refused():
    with pytest.raises(UsageError, match="hugetlb-2M: a page cannot be placed by zeropage"):
        memory_type("hugetlb-2M").ioctls_for(Way.COPY, Way.ZEROPAGE)
    assert memory_type("shmem").ioctls_for(Way.COPY) == Ioctl.COPY | Ioctl.WAKE


@pytest.mark.parametrize("name", ["hugetlb-2M", "hugetlb-1G"])
def test_huge_pages_carry_bytes_both_ways_of_placing(name, huge_pages):
    known = memory_type(name)
    huge_pages(name, 2 if name == "hugetlb-2M" else 1)
    size = known.page_size
    region = Region(0, name, size, size)
    before = known.pool()
    with known.allocate(region) as mapping, Userfaultfd.open(optional=PLAIN) as uffd:
        # One reservation, however many mappings.
        assert known.pool().unclaimed == before.unclaimed - 1
        uffd.register(mapping.address, size, known.modes_for(alias=True))
        calls.write_memory(mapping.alias + size - 4, b"tail")
        assert uffd.continue_(mapping.address, size).outcome is Outcome.PLACED
        assert calls.read_memory(mapping.address + size - 4, 4) == b"tail"
    with known.allocate(region, alias=False) as mapping, Userfaultfd.open(optional=PLAIN) as uffd:
        uffd.register(mapping.address, size, known.modes_for(alias=False))
        source = calls.map_anonymous(size)
        # All of the source must be there: see the room's README on COPY into huge pages.
        for offset in range(0, size, HUGE):
            calls.write_memory(source + offset, bytes(HUGE))
        calls.write_memory(source + size - 4, b"tail")
        assert uffd.copy(mapping.address, source, size).outcome is Outcome.PLACED
        assert calls.read_memory(mapping.address + size - 4, 4) == b"tail"
        calls.unmap(source, size)
    assert known.pool() == before


@pytest.mark.parametrize("region", [Region(1, "hugetlb-2M", HUGE, HUGE), Region(1, "shmem", HUGE, HUGE)])
def test_a_region_of_another_type_or_page_size_is_refused(region):
    with pytest.raises(UsageError, match=r"region 1 is .* not shmem with 4096"):
        memory_type("shmem").allocate(region)


@pytest.fixture
def pool(tmp_path):
    """Return a function that makes a hugetlb type whose pool is a folder of plain files."""

    def make(nr=0, free=0, resv=0, overcommit=0, surplus=0):
        huge = Hugetlb("hugetlb-2M", HUGE)
        huge.pool_folder = tmp_path
        counts = {"nr": nr, "free": free, "resv": resv, "nr_overcommit": overcommit, "surplus": surplus}
        for name, count in counts.items():
            (tmp_path / f"{name}_hugepages").write_text(f"{count}\n")
        return huge

    return make


def test_promised_huge_pages_are_no_room_and_the_command_says_how_many_to_have(pool, tmp_path):
    huge = pool(nr=10, free=8, resv=5)
    assert huge.pool() == Pool(total=10, free=8, reserved=5, more=0)
    huge.check_room(3 * HUGE)
    with pytest.raises(HostError) as caught:
        huge.check_room(3 * HUGE + 1)
    assert "4 huge pages asked for, 3 of 10 unclaimed" in str(caught.value)
    assert f"echo 11 > {tmp_path}/nr_hugepages" in str(caught.value)
    assert caught.value.exit_status == 3


def test_huge_pages_that_the_kernel_may_still_make_are_room(pool):
    pool(nr=3, free=1, overcommit=4, surplus=2).check_room(3 * HUGE)
    with pytest.raises(HostError):
        pool(nr=3, free=1, overcommit=4, surplus=2).check_room(4 * HUGE)


def test_a_page_size_that_the_machine_has_not_got_is_named(tmp_path):
    huge = Hugetlb("hugetlb-2M", HUGE)
    huge.pool_folder = tmp_path / "missing"
    with pytest.raises(HostError, match="no huge pages of 2 MiB"):
        huge.check_room(HUGE)


def test_too_many_huge_pages_are_refused_before_anything_is_allocated():
    huge = memory_type("hugetlb-2M")
    try:
        before = huge.pool()
    except HostError as missing:
        lacking(str(missing))
    with pytest.raises(HostError, match=r"echo .* > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"):
        huge.allocate(Region(0, "hugetlb-2M", HUGE, (before.unclaimed + before.more + 1) * HUGE))
    assert huge.pool() == before


def test_more_shmem_than_the_machine_has_is_refused():
    with pytest.raises(HostError, match=r"8 TiB .* available by"):
        memory_type("shmem").allocate(Region(0, "shmem", PAGE, 8 << 40))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 1 GiB whose process sits in cgroup /a/b."""
    (tmp_path / "meminfo").write_text("MemTotal: 2097152 kB\nMemAvailable: 1048576 kB\nSwapFree: 0 kB\n")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("4:cpu:/elsewhere\n0::/a/b\n")
    (tmp_path / "proc" / "self" / "mountinfo").write_text("41 31 0:38 / / rw - cgroup2 none rw\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr(shmem_module, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(shmem_module, "memory_left", partial(memory_left, tmp_path))

    def limit(path, maximum, current, droppable=0):
        (tmp_path / path / "memory.max").write_text(f"{maximum}\n")
        (tmp_path / path / "memory.current").write_text(f"{current}\n")
        (tmp_path / path / "memory.stat").write_text(f"anon 1\ninactive_file {droppable}\nactive_file 0\n")

    return limit


def test_the_narrowest_limit_counts(machine):
    shmem = memory_type("shmem")
    shmem.check_room(1 << 30)
    with pytest.raises(HostError, match=r"1 GiB .* available by MemAvailable"):
        shmem.check_room((1 << 30) + 1)
    machine("a/b", "max", 0)
    shmem.check_room(1 << 30)
    machine("a", 600 << 20, 200 << 20, 50 << 20)
    shmem.check_room(450 << 20)
    with pytest.raises(HostError, match=r"450 MiB .* available by .*/a/memory\.max"):
        shmem.check_room((450 << 20) + 1)
    machine("a/b", 100 << 20, 300 << 20)
    with pytest.raises(HostError, match="0 B"):
        shmem.check_room(PAGE)


def test_a_new_type_is_a_class_and_a_line(monkeypatch):
    class Ram(MemoryType):
        name = "ram"
        page_size = PAGE
        alias = True
        modes = Mode.MISSING | Mode.MINOR
        features = shmem_module.Shmem.features
        ways = shmem_module.Shmem.ways

        def create_file(self, label, size):
            descriptor = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
            os.ftruncate(descriptor, size)
            return descriptor

        def check_room(self, size):
            pass

        def zero_way(self, *, alias):
            return Way.ZEROPAGE

    monkeypatch.setitem(MEMORY_TYPES, "ram", Ram())
    known = memory_type("ram")
    assert known.probe().granted(Mode.MISSING | Mode.MINOR) & Ioctl.CONTINUE
    with known.allocate(Region(0, "ram", PAGE, PAGE)) as mapping, Userfaultfd.open(optional=PLAIN) as uffd:
        uffd.register(mapping.address, PAGE, known.modes_for(alias=True))
        calls.write_memory(mapping.alias, b"new")
        uffd.continue_(mapping.address, PAGE)
        assert calls.read_memory(mapping.address, 3) == b"new"


@pytest.mark.usefixtures("small_pages")
def test_a_sparse_region_needs_room_for_its_data_only(machine):
    shmem = memory_type("shmem")
    region = Region(0, "shmem", PAGE, 1 << 40)
    with shmem.allocate(region, data=1 << 30) as mapping:
        assert mapping.allocated == 0
        os.pwrite(mapping.fd, b"x", (1 << 40) - 1)
        os.pwrite(mapping.fd, b"x" * 8192, 1 << 30)
        assert mapping.allocated == 3 * PAGE
    with pytest.raises(HostError, match="available by MemAvailable"):
        shmem.allocate(region, data=(1 << 30) + PAGE)
    with pytest.raises(HostError, match="available by MemAvailable"):
        shmem.allocate(region)
    assert shmem.room_for(PAGE, 1 << 40) == PAGE


def test_memory_that_is_set_aside_or_promised_needs_room_for_all_of_it(machine):
    assert {name for name, known in MEMORY_TYPES.items() if known.thin} == {"shmem", "tmpfs"}
    for name in ("anonymous", "hugetlb-2M"):
        known = memory_type(name)
        assert known.room_for(8 * HUGE, PAGE) == 8 * HUGE
    with pytest.raises(HostError, match="available by MemAvailable"):
        memory_type("anonymous").allocate(Region(0, "anonymous", PAGE, 1 << 40), data=PAGE)
    with memory_type("anonymous").allocate(Region(0, "anonymous", PAGE, HUGE)) as mapping:
        assert mapping.allocated == HUGE, "nobody counts it"
