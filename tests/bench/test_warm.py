"""Memory found before a run is the memory that the run gets: looked up by its physical pages, on the real kernel."""

from __future__ import annotations

import mmap
import os

import pytest

from agent.bench import runner, warm
from agent.bench._floor import ffi
from agent.bench.floor import FloorSetup
from agent.bench.product import ProductSetup
from agent.bench.runner import Bench, Plan
from agent.bench.scenarios import Scenario
from agent.bench.warm import BLOCK, MIB, Warm
from postcopy.kernel import memory_type
from postcopy.kernel.hugetlb import Pool
from postcopy.pages.regions import Region
from tests.lacking import lacking

IN_BLOCK = BLOCK // mmap.PAGESIZE
PRESENT = 1 << 63
NUMBER = (1 << 55) - 1


def page_numbers(memory):
    """Return the physical page of each page of a mapping, None for one that is not there."""
    with ffi.from_buffer(memory) as start, warm.PAGEMAP.open("rb", buffering=0) as pagemap:
        pagemap.seek(int(ffi.cast("uintptr_t", start)) // mmap.PAGESIZE * 8)
        entries = memoryview(pagemap.read(len(memory) // mmap.PAGESIZE * 8)).cast("Q")
    return [entry & NUMBER if entry & PRESENT else None for entry in entries]


@pytest.fixture(autouse=True)
def _who_may_know():
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        memory[0] = 1
        if page_numbers(memory) == [0]:
            lacking("where pages are is told to CAP_SYS_ADMIN alone")


@pytest.fixture
def populated(monkeypatch):
    """The physical pages of all that was populated, in turn."""
    found = []
    populate = warm._populate

    def recording(memory):
        populate(memory)
        found.append(page_numbers(memory))

    monkeypatch.setattr(warm, "_populate", recording)
    return found


@pytest.fixture
def small_stock(monkeypatch):
    monkeypatch.setattr(warm, "BESIDE", 8 * MIB)


@pytest.mark.usefixtures("small_stock")
def test_the_stock_keeps_one_page_of_each_block_that_it_had_and_gives_the_rest_back(populated):
    with Warm() as machine:
        machine.find("shmem", 12 * MIB)
        kept = [number for number in page_numbers(machine._stock) if number is not None]
    (taken,) = populated
    assert len(taken) * mmap.PAGESIZE == 32 * MIB
    assert None not in taken
    # Free memory in small pieces may be of as many blocks as it has pages, nearly: how many are kept is theirs to say.
    blocks = [number // IN_BLOCK for number in kept]
    assert len(blocks) == len(set(blocks))
    assert set(blocks) == {number // IN_BLOCK for number in taken}


def test_single_pages_come_off_the_stock(populated):
    with Warm() as machine, mmap.mmap(-1, 16 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as run:
        machine.find("shmem", 64 * MIB)
        run.madvise(mmap.MADV_NOHUGEPAGE)
        for offset in range(0, len(run), mmap.PAGESIZE):
            run[offset] = 1
        numbers = page_numbers(run)
    stocked = {number // IN_BLOCK for number in populated[0]}
    assert sum(number // IN_BLOCK in stocked for number in numbers) > 0.9 * len(numbers)


@pytest.mark.usefixtures("small_stock")
def test_the_stock_is_as_large_as_the_largest_run_and_is_not_made_again(populated):
    with Warm() as machine:
        for data in (4 * MIB, 4 * MIB, 2 * MIB, 12 * MIB, 4 * MIB):
            machine.find("shmem", data)
        assert [len(numbers) * mmap.PAGESIZE for numbers in populated] == [16 * MIB, 32 * MIB]
        assert len(machine._stock) == 32 * MIB
    assert machine._stock is None


@pytest.mark.usefixtures("small_stock")
def test_of_what_is_handed_over_there_is_one_copy(populated):
    with Warm() as machine:
        machine.find("shmem", 12 * MIB, copies=ProductSetup(handover=True).copies)
    assert [len(numbers) * mmap.PAGESIZE for numbers in populated] == [20 * MIB]


@pytest.mark.usefixtures("small_stock")
def test_no_more_is_taken_than_the_machine_has(monkeypatch, populated):
    monkeypatch.setattr(warm, "available_bytes", lambda: 16 * MIB)
    with Warm() as machine:
        machine.find("shmem", 1 << 40)
        machine.find("anonymous", 1 << 40, thp=True)
    assert [len(numbers) * mmap.PAGESIZE for numbers in populated] == [14 * MIB, 8 * MIB]


@pytest.mark.usefixtures("small_stock")
def test_transparent_huge_pages_find_no_stock_in_their_way(populated):
    with Warm() as machine:
        machine.find("anonymous", 4 * MIB)
        assert machine._stock is not None
        machine.find("anonymous", 4 * MIB, thp=True)
        assert machine._stock is None
    assert [len(numbers) * mmap.PAGESIZE for numbers in populated] == [16 * MIB, 16 * MIB]


@pytest.mark.parametrize(
    ("setting", "huge"),
    [("always", True), ("within_size", True), ("force", True), ("advise", False), ("never", False), ("deny", False)],
)
def test_memory_that_is_huge_of_itself_is_known_by_the_hosts_setting(monkeypatch, tmp_path, setting, huge):
    (tmp_path / "shmem_enabled").write_text(
        "always within_size advise never deny force".replace(setting, f"[{setting}]")
    )
    monkeypatch.setattr(warm, "THP", tmp_path)
    assert warm._huge_of_itself("shmem") == huge
    assert not warm._huge_of_itself("anonymous")


def test_the_pages_of_a_pool_that_are_touched_are_those_that_both_ends_get(huge_pages, populated):
    huge_pages("hugetlb-2M", 12 + warm.BESIDE_HUGE_PAGES)
    huge = memory_type("hugetlb-2M")
    with Warm() as machine:
        machine.find("hugetlb-2M", 4 * BLOCK)
    with (
        huge.allocate(Region(0, huge.name, BLOCK, 4 * BLOCK)) as source,
        huge.allocate(Region(0, huge.name, BLOCK, 4 * BLOCK)) as destination,
    ):
        ends = []
        for end in (source, destination):
            with mmap.mmap(os.dup(end.fd), 4 * BLOCK) as memory:
                for offset in range(0, len(memory), BLOCK):
                    memory[offset] = 1
                ends += page_numbers(memory)[::IN_BLOCK]
    (touched,) = populated
    assert len(touched) // IN_BLOCK == 8 + warm.BESIDE_HUGE_PAGES
    assert set(ends) <= set(touched)


def test_of_a_pool_no_more_is_touched_than_is_free(monkeypatch, huge_pages, populated):
    huge_pages("hugetlb-2M", 3)
    monkeypatch.setattr("agent.bench.warm.Hugetlb.pool", lambda _huge: Pool(total=9, free=5, reserved=2, more=0))
    with Warm() as machine:
        machine.find("hugetlb-2M", 1 << 40)
        monkeypatch.setattr("agent.bench.warm.Hugetlb.pool", lambda _huge: Pool(total=9, free=2, reserved=2, more=0))
        machine.find("hugetlb-2M", 1 << 40)
    assert [len(touched) // IN_BLOCK for touched in populated] == [3]


def test_every_run_of_either_kind_finds_the_same_memory_first(monkeypatch):
    order = []

    class Recorded(Warm):
        def find(self, memory, data, *, copies=2, thp=False):
            order.append((memory, data, copies, thp))

    def interrupted(_setup):
        order.append("run")
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "Warm", Recorded)
    monkeypatch.setattr(runner, "run_floor", interrupted)
    scenario = Scenario("tiny", ProductSetup(size=2 * MIB, push=False), {"copy": FloorSetup(2 * MIB)})
    Bench(Plan(pairs=1), lambda what, *_: order.append(what)).run([scenario])
    found = ("shmem", 2 * MIB, 2, False)
    assert order == ["tiny: product", found, "tiny: floor, copy", found, "run"]
