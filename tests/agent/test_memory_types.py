"""Every memory type in every mode through whole migrations between real daemons, checked to the last byte.

shmem and hugetlb-2M are in test_demo.py. Here are the others, huge pages of either kind, and mixed guests.
"""

import stat
from pathlib import Path

import pytest

from agent.parameters import Memory, parse_memory
from postcopy.errors import UsageError
from postcopy.kernel import memory_type
from postcopy.wire.control import Refuse, RegionOffer
from tests.lacking import lacking

from .agents import Command, destination, run, source
from .fakes import OFFER, FakeDestination, FakeSource

MIB = 1 << 20
THP = Path("/sys/kernel/mm/transparent_hugepage")
SHMEM_THP = THP / "shmem_enabled"


def migrated(*arguments, deadline=60):
    """Migrate by `demo` and return its report, once all of it is seen to be right."""
    done = run("demo", *arguments, "--json", deadline=deadline)
    assert done.status == 0, done.err
    report = done.json
    pages, memory = report["pages"], report["memory"]
    assert report["outcome"] == "completed"
    assert pages["total"] == sum(one["size_bytes"] // one["page_size"] for one in memory)
    assert pages["demand"] + pages["push"] + pages["zero"] == pages["total"]
    checked = sum(one["size_bytes"] for one in memory) // 4096
    assert report["integrity"] == {"page_size": 4096, "pages_checked": checked, "pages_mismatched": 0}
    return report


def shape(report):
    return [(one["type"], one["page_size"], one["size_bytes"]) for one in report["memory"]]


@pytest.mark.parametrize(
    ("mode", "workload"), [("auto", "random"), ("missing", "increment"), ("move", "sequential"), ("move", "zipf")]
)
def test_anonymous(mode, workload):
    report = migrated("--memory", "anonymous", "--size", "32MiB", "--mode", mode, "--workload", workload)
    assert (report["mode"], shape(report)) == (mode, [("anonymous", 4096, 32 * MIB)])
    assert report["pages"]["zero"] >= 1024  # the blank part: neither read into being nor sent


@pytest.mark.parametrize("mode", ["auto", "minor", "missing"])
def test_a_file_of_tmpfs(mode, mount):
    folder = mount("tmpfs", "size=80M")
    report = migrated("--memory", f"tmpfs:{folder}/guest:32MiB", "--mode", mode)
    assert shape(report) == [("tmpfs", 4096, 32 * MIB)]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("mode", ["auto", "minor", "missing"])
def test_a_file_of_hugetlbfs(mode, mount, huge_pages):
    huge_pages("hugetlb-2M", 32)
    folder = mount("hugetlbfs", "pagesize=2M")
    report = migrated("--memory", f"hugetlbfs:{folder}", "--size", "32MiB", "--mode", mode, "--workload", "increment")
    assert shape(report) == [("hugetlbfs-2M", 2 * MIB, 32 * MIB)]


@pytest.mark.parametrize("mode", ["auto", "missing"])
def test_huge_pages_of_one_gibibyte(mode, huge_pages):
    # By COPY each connection's buffer takes a whole page as well.
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    if available < (9 << 30):
        lacking(f"9 GiB for both ends and the buffers, {available >> 20} MiB are available")
    huge_pages("hugetlb-1G", 2)
    report = migrated(
        *("--memory", "hugetlb-1G:1GiB", "--mode", mode, "--workload", "increment", "--vcpus", "1"), deadline=110
    )
    assert shape(report) == [("hugetlb-1G", 1 << 30, 1 << 30)]
    assert report["pages"]["total"] == 1
    # What a fault costs is said: the whole page had to come.
    assert report["fault_latency_seconds"]["max"] > 0.05


# --- transparent huge pages -------------------------------------------------------------------------------------------


def huge_bytes(pid, field):
    """Return how much of a process's memory is mapped by transparent huge pages."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def through_huge_pages(tmp_path, memory, field, *arguments, mode="auto"):
    """Migrate a guest whose memory is huge pages at the source, and check it."""
    with (
        destination(tmp_path, "--mode", mode) as there,
        source(tmp_path, "--memory", memory, *arguments, size="32MiB") as here,
    ):
        assert huge_bytes(here.status()["pid"], field) >= 16 * MIB, "the guest has no huge pages: this proves nothing"
        here.runs_on()
        done = run("migrate", "--admin", here.admin, there.address, "--json")
        assert done.status == 0, done.err
        verdict = run("check", "--admin", there.admin, "--json").json
        assert (verdict["pages_checked"], verdict["pages_mismatched"]) == (8192, 0)
        there.runs_on()
    return done.json


@pytest.mark.parametrize("mode", ["auto", "minor", "missing"])
@pytest.mark.parametrize(("setting", "arguments"), [("advise", ["--thp"]), ("always", [])])
def test_shmem_of_huge_pages(setting, arguments, mode, tmp_path, set_kernel):
    if not SHMEM_THP.exists():
        lacking("this kernel has no transparent huge pages for shmem")
    set_kernel(SHMEM_THP, setting)
    report = through_huge_pages(tmp_path, "shmem", "ShmemPmdMapped", *arguments, mode=mode)
    # Demand keeps the granularity of small pages, and the blank part costs nothing.
    assert report["pages"]["total"] == 8192
    assert report["pages"]["zero"] >= 1024


@pytest.mark.parametrize("mode", ["auto", "move"])
@pytest.mark.parametrize(("setting", "arguments"), [("madvise", ["--thp"]), ("always", [])])
def test_anonymous_memory_of_huge_pages(setting, arguments, mode, tmp_path, set_kernel):
    if not (THP / "enabled").exists():
        lacking("this kernel has no transparent huge pages")
    set_kernel(THP / "enabled", setting)
    report = through_huge_pages(tmp_path, "anonymous", "AnonHugePages", *arguments, mode=mode)
    assert report["pages"]["total"] == 8192
    assert report["pages"]["zero"] >= 1024


# --- several kinds in one guest ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "missing"])
def test_regions_of_all_kinds_migrate_together(mode, mount, huge_pages):
    huge_pages("hugetlb-2M", 24)
    tmpfs, hugetlbfs = mount("tmpfs", "size=32M"), mount("hugetlbfs", "pagesize=2M")
    memory = ["anonymous:12MiB", "hugetlb-2M:16MiB", "shmem", f"tmpfs:{tmpfs}:4MiB", f"hugetlbfs:{hugetlbfs}/it:8MiB"]
    report = migrated(*(word for one in memory for word in ("--memory", one)), "--size", "8MiB", "--mode", mode)
    assert shape(report) == [
        ("anonymous", 4096, 12 * MIB),
        ("hugetlb-2M", 2 * MIB, 16 * MIB),
        ("shmem", 4096, 8 * MIB),
        ("tmpfs", 4096, 4 * MIB),
        ("hugetlbfs-2M", 2 * MIB, 8 * MIB),
    ]


# --- where it lies is each host's own business ------------------------------------------------------------------------


def test_paths_stay_at_home(tmp_path, mount):
    name = mount("tmpfs", "size=16M") / "secret-name"
    with source(tmp_path, "--memory", f"tmpfs:{name}", size="8MiB") as here:
        assert stat.S_IMODE(name.stat().st_mode) == 0o600
        with FakeDestination() as fake, Command("migrate", "--admin", here.admin, fake.address) as migration:
            offered = fake.upto_offer().offered
            fake.control.send(Refuse("busy", "later"))
            assert migration.result().status == 4
        assert offered.regions == (RegionOffer("tmpfs", 4096, 8 * MIB),)
        here.runs_on()
        # A destination that was given no place takes a memfd, and nobody can tell.
        with destination(tmp_path) as there:
            assert run("migrate", "--admin", here.admin, there.address).status == 0
            assert not name.exists()
            assert run("check", "--admin", there.admin).status == 0
            assert files_of(there, "memfd:")


def files_of(daemon, text):
    folder = Path(f"/proc/{daemon.status()['pid']}/fd")
    return [link for link in (str(entry.readlink()) for entry in folder.iterdir()) if text in link]


def test_a_destination_puts_memory_where_it_is_told(tmp_path, mount):
    one, two = mount("tmpfs", "size=16M"), mount("tmpfs", "size=16M")
    with (
        source(tmp_path, "--memory", f"tmpfs:{one}", size="8MiB") as here,
        destination(tmp_path, "--memory-dir", two) as there,
    ):
        assert run("migrate", "--admin", here.admin, there.address).status == 0
        there.runs_on()
        assert len(files_of(there, str(two))) == 1
        assert files_of(there, "memfd:") == []
        assert run("check", "--admin", there.admin).status == 0


# --- what is refused, in one line and before the guest is stopped -----------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "page_size", "text"),
    [
        ("shmem", 65536, "region 0 is shmem with pages of 65536 bytes, not shmem with 4096"),
        ("anonymous", 16384, "region 0 is anonymous with pages of 16384 bytes, not anonymous with 4096"),
        ("hugetlb-2M", 1 << 25, "region 0 is hugetlb-2M with pages of 33554432 bytes, not hugetlb-2M with 2097152"),
    ],
)
def test_page_sizes_that_differ_are_named_both(tmp_path, kind, page_size, text):
    offer = type(OFFER)((RegionOffer(kind, page_size, 1 << 30),), OFFER.guest)
    with destination(tmp_path) as there, FakeSource(there.address) as fake:
        fake.greet()
        fake.control.send(offer)
        refusal = fake.control.expect(Refuse)
        assert (refusal.code, refusal.text) == ("layout", text)


def test_a_mode_that_a_region_cannot_have_leaves_the_guest_where_it_is(tmp_path):
    with (
        source(tmp_path, "--memory", "shmem:4MiB", "--memory", "anonymous:4MiB") as here,
        destination(tmp_path, "--mode", "move") as moving,
    ):
        done = run("migrate", "--admin", here.admin, moving.address)
        assert done.status == 4
        assert "memory of type shmem cannot be migrated in mode move, only in: auto, minor, missing" in done.one_line()
        here.runs_on()
        (tmp_path / "minor").mkdir()
        with destination(tmp_path / "minor", "--mode", "minor") as minor:
            done = run("migrate", "--admin", here.admin, minor.address)
        assert (
            "memory of type anonymous cannot be migrated in mode minor, only in: auto, missing, move" in done.one_line()
        )
        here.runs_on()


def test_guest_memfd_where_the_kernel_cannot_trap_it():
    if memory_type("guest_memfd").probe().reason is None:
        migrated("--memory", "guest_memfd", "--size", "16MiB")
        return
    done = run("source", "--memory", "guest_memfd", "--size", "16MiB")
    assert done.status == 3
    assert done.err.strip().splitlines()[-1].startswith("postcopy: --memory: guest_memfd: ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["source", "--memory", "tmpfs"], "memory tmpfs needs a place"),
        (["source", "--memory", "tmpfs:/proc"], "/proc lies on proc"),
        (["source", "--memory", "shmem:/dev/shm"], "memory shmem has no place in the file system"),
        (["source", "--memory", "shmem:"], "memory 'shmem:' is not understood: write TYPE"),
        (["source", "--memory", "shmem:5000"], "region 0: size 5000 is not a multiple of the page size 4096"),
        (["source", "--memory", "shmem:1M", "--memory", "anonymous:7000"], "region 1: size 7000 is not a multiple"),
        (["destination", "--memory-dir", "/proc"], "/proc lies on proc"),
        (["destination", "--memory-dir", "/nowhere"], "/nowhere is no directory"),
        (["source", "--memory", f"tmpfs:/dev/shm/{'n' * 300}"], "File name too long"),
        (["destination", "--memory-dir", f"/dev/shm/{'n' * 300}"], "File name too long"),
        (["source", "--memory", "shmem:0", "--size", "8MiB"], "there is no memory of no size"),
        (["source", "--size", "0"], "there is no memory of no size"),
        (["demo", "--memory", "shmem:0"], "there is no memory of no size"),
        (["demo", "--memory", "tmpfs:/dev/shm:0KiB"], "there is no memory of no size"),
    ],
)
def test_memory_that_makes_no_sense_is_one_line(arguments, text):
    done = run(*arguments)
    assert done.status == 2, done.err
    assert text in done.one_line()


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("shmem", Memory("shmem")),
        ("shmem:4MiB", Memory("shmem", None, 4 * MIB)),
        ("tmpfs:/dev/shm", Memory("tmpfs", Path("/dev/shm"))),
        ("tmpfs:/dev/shm/guest:1G", Memory("tmpfs", Path("/dev/shm/guest"), 1 << 30)),
        ("tmpfs:/dev/shm/a:b", Memory("tmpfs", Path("/dev/shm/a:b"))),
        ("hugetlbfs:/mnt:2/huge:2M", Memory("hugetlbfs", Path("/mnt:2/huge"), 2 * MIB)),
    ],
)
def test_memory_is_read_as_it_is_typed(text, memory):
    assert parse_memory(text) == memory
    assert parse_memory(str(memory)) == memory


@pytest.mark.parametrize("text", ["", ":4M", "shmem:", "shmem:many", "tmpfs:relative/path"])
def test_memory_that_cannot_be_read(text):
    with pytest.raises(UsageError, match="not understood"):
        parse_memory(text)
