"""The check finds what it is there to find: any bit, any page, any lost visit."""

from __future__ import annotations

import itertools
import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy.errors import KernelError
from postcopy.guest import WORKLOADS, CheckResult, Guest
from postcopy.kernel import memory_type
from postcopy.pages import Region
from tests.guest.memory import PAGE, Memory
from tests.guest.model import Model

PAGES, BLANK = 48, 16  # 32 active, 8 holes, 8 zeroed
EVERY = sorted(WORKLOADS)


def ran(memory: Memory, workload: str, steps: int = 45) -> Guest:
    """Return a stopped guest that has run on `memory`, into its second pass (zipf: its first)."""
    guest = Guest([memory], workload=workload, seed=3, nonce=4, blank=BLANK / PAGES, stride=7, steps_max=steps)
    guest.fill()
    guest.start()
    guest.wait()
    guest.stop()
    return guest


@pytest.mark.parametrize("workload", EVERY)
@given(st.lists(st.integers(0, PAGES * PAGE * 8 - 1), min_size=1, max_size=5, unique=True))
@settings(max_examples=40, deadline=None)
def test_finds_a_flipped_bit_anywhere(workload: str, bits: list[int]) -> None:
    with Memory(PAGES) as memory, ran(memory, workload) as guest:
        for bit in bits:
            memory.flip(bit // 8, bit % 8)
        pages = sorted({bit // 8 // PAGE for bit in bits})
        for threads in (1, 3):
            assert guest.check(threads=threads) == CheckResult(PAGES, len(pages), pages[0])


@pytest.mark.parametrize("page", range(PAGES))
def test_finds_one_bit_in_each_page(page: int) -> None:
    with Memory(PAGES) as memory, ran(memory, "random") as guest:
        memory.flip(page * PAGE + 4095, 7)
        assert guest.check() == CheckResult(PAGES, 1, page)


@pytest.mark.parametrize("workload", EVERY)
def test_finds_two_swapped_pages(workload: str) -> None:
    with Memory(PAGES) as memory, ran(memory, workload) as guest:
        data = memory.read()
        memory.write(data[PAGE : 2 * PAGE] + data[:PAGE] + data[2 * PAGE :])
        assert guest.check() == CheckResult(PAGES, 2, 0)


@pytest.mark.parametrize("workload", EVERY)
def test_finds_a_page_that_lost_one_visit(workload: str) -> None:
    with Memory(PAGES) as memory:
        with ran(memory, workload, 44) as guest:
            before, state = memory.read(), guest.save()
        with Guest.restore([memory], state | {"steps_max": 45}) as guest:
            guest.start()
            guest.wait()
            after = memory.read()
            visited = [p for p in range(PAGES) if before[p * PAGE :][:PAGE] != after[p * PAGE :][:PAGE]]
            assert 1 <= len(visited) <= 2
            for page in visited:
                old = before[page * PAGE : (page + 1) * PAGE]
                memory.write(after[: page * PAGE] + old + after[(page + 1) * PAGE :])
                assert guest.check() == CheckResult(PAGES, 1, page)
            memory.write(after)
            assert guest.check().pages_mismatched == 0


def test_finds_zeros_where_a_page_never_arrived() -> None:
    with Memory(PAGES) as memory, ran(memory, "zipf") as guest:
        data = memory.read()
        memory.write(data[: 5 * PAGE] + bytes(PAGE) + data[6 * PAGE :])
        assert guest.check() == CheckResult(PAGES, 1, 5)


def test_a_state_of_other_steps_does_not_pass() -> None:
    with Memory(PAGES) as memory:
        with ran(memory, "sequential") as guest:
            state = guest.save()
        state["vcpus"][1][1:] = [state["vcpus"][1][1] + 1, state["vcpus"][1][2] + 1]
        with Guest.restore([memory], state) as guest:
            assert guest.check().pages_mismatched == 1


@given(st.binary(min_size=PAGES // 8, max_size=PAGES // 8), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_checks_only_the_pages_asked_for(bitmap: bytes, threads: int) -> None:
    wanted = [page for page in range(PAGES) if bitmap[page // 8] >> page % 8 & 1]
    with Memory(PAGES) as memory, ran(memory, "random") as guest:
        for page in range(PAGES):
            memory.flip(page * PAGE, 0)
        expected = CheckResult(len(wanted), len(wanted), min(wanted, default=None))
        assert guest.check(bitmap, threads=threads) == expected


def test_a_bitmap_of_another_size_is_refused() -> None:
    with Memory(PAGES) as memory, ran(memory, "random") as guest, pytest.raises(ValueError, match="no bitmap"):
        guest.check(bytes(5))


@pytest.mark.parametrize("steps", [0, 1, 31, 32, 33, 45, 64 + 7, 32 * 256 + 5])
def test_increment_descends_by_one_at_most_once(steps: int) -> None:
    """Read by this test alone, with no count of visits: all lane bytes equal but for one step of -1."""
    model = Model("increment", 2, 3, 4, PAGES - BLANK)
    with Memory(PAGES) as memory, ran(memory, "increment", steps) as guest:
        data = memory.read()
        for vcpu in range(2):
            lane = [data[model.lane_offset(page, vcpu)] for page in range(PAGES - BLANK)]
            changes = [(later - earlier) % 256 for earlier, later in itertools.pairwise(lane)]
            assert [change for change in changes if change] in ([], [255])
            assert changes.count(255) == (steps % 32 != 0)
        assert guest.check().pages_mismatched == 0


@pytest.mark.parametrize("page", range(PAGES))
def test_all_blank_pages_can_be_holes_and_one_bit_in_any_is_found(page: int) -> None:
    with Memory(PAGES) as memory, Guest([memory], seed=3, blank=BLANK / PAGES, holes=True, steps_max=45) as guest:
        guest.fill()
        guest.start()
        guest.wait()
        assert guest.check() == CheckResult(PAGES, 0, None)
        assert memory.allocated() == PAGES - BLANK, "nothing was written there, and the check read nothing into being"
        memory.flip(page * PAGE + 4095, 7)
        assert guest.check() == CheckResult(PAGES, 1, page)
        assert guest.save()["hole_pages"] == guest.save()["blank_pages"] == BLANK


@given(
    flipped=st.sets(st.integers(0, 3 * PAGES - 1), max_size=20),
    touched=st.sets(st.integers(0, 3 * PAGES - 1), max_size=20),
    bitmap=st.none() | st.binary(min_size=3 * PAGES // 8, max_size=3 * PAGES // 8),
    threads=st.integers(1, 4),
    kinds=st.lists(st.sampled_from(["shmem", "anonymous"]), min_size=3, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_holes_over_several_regions(
    flipped: set[int], touched: set[int], bitmap: bytes | None, threads: int, kinds: list[str]
) -> None:
    """Pages with data among the holes, zeros (touched) or not (flipped): only the wrong ones count, all are checked."""
    pages = range(3 * PAGES)
    chosen = [page for page in pages if bitmap is None or bitmap[page // 8] >> page % 8 & 1]
    with ExitStack() as stack:
        memories = [stack.enter_context(Memory(PAGES, kind=kind)) for kind in kinds]
        with Guest(memories, seed=3, blank=0.9, holes=True) as guest:
            guest.fill()
            for page in touched - flipped:
                memories[page // PAGES].flip(page % PAGES * PAGE, 0)
                memories[page // PAGES].flip(page % PAGES * PAGE, 0)
            for page in flipped:
                memories[page // PAGES].flip(page % PAGES * PAGE, 0)
            wrong = sorted(flipped & set(chosen))
            expected = CheckResult(len(chosen), len(wrong), min(wrong, default=None))
            assert guest.check(bitmap, threads=threads) == expected


def test_a_quarter_of_a_tebibyte_of_holes_is_checked_at_once() -> None:
    size, active = 256 << 30, 1 << 20
    region = Region(0, "shmem", PAGE, size)
    with (
        memory_type("shmem").allocate(region, alias=False, data=active) as mapping,
        Guest([mapping], seed=3, blank=1 - active / size, holes=True) as guest,
    ):
        guest.fill()
        began = time.monotonic()
        assert guest.check(threads=2) == CheckResult(size // PAGE, 0, None)
        assert mapping.allocated == active
        os.pwrite(mapping.fd, b"\x01", size - 1)
        assert guest.check(threads=2) == CheckResult(size // PAGE, 1, size // PAGE - 1)
        assert time.monotonic() - began < 5, "each hole was looked at by itself"


def test_a_file_that_ends_before_its_mapping_is_no_hole(tmp_path: Path) -> None:
    with (
        (tmp_path / "memory").open("w+b") as file,
        Memory(PAGES) as memory,
    ):
        file.truncate(PAGES * PAGE)
        memory.fd = file.fileno()
        with Guest([memory], seed=3, blank=0.5, holes=True) as guest:
            assert guest.check(bytes(PAGES // 8)).pages_checked == 0
            file.truncate((PAGES - 1) * PAGE)
            with pytest.raises(KernelError, match="file"):
                guest.check(bytes(PAGES // 8))
