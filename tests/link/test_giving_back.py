"""A guest's balloon during a whole migration: what it gives back is not fetched, and all the rest arrives."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from postcopy.errors import UsageError
from tests.child import run_in_child
from tests.link.test_library import make_destination, make_source, switched_over

SIZE = 16 << 20
BLANK = SIZE // 8  # at the end of the memory: the guest leaves it blank
SECONDS = 40
TEXT = b"in a page that the guest leaves blank"


async def inflate(memory: str, mode: str) -> tuple[dict, int, int]:
    from postcopy.link import Source

    mapping, guest = make_source(memory, size=SIZE)
    async with make_destination(mode) as destination, Source([mapping], guest) as source:
        migration = asyncio.create_task(source.migrate(str(destination.address), push=False))
        await switched_over(destination, migration)
        pages = range(SIZE - BLANK, SIZE, mapping.region.page_size * 4)
        for offset in pages[: len(pages) // 2]:
            await asyncio.to_thread(destination.give_back, 0, offset, mapping.region.page_size * 4)
        await source.start_push()
        for offset in pages[len(pages) // 2 :]:  # against the push
            await asyncio.to_thread(destination.give_back, 0, offset, mapping.region.page_size * 4)
        report = await migration
        await destination.migrated()
        await asyncio.to_thread(destination.give_back, 0, SIZE - BLANK, BLANK)  # and when all is over
        arrived = destination.guest
        await asyncio.to_thread(arrived.stop)
        result = await asyncio.to_thread(arrived.check)
        return report["pages"], destination.snapshot().pages_removed, result.pages_mismatched


async def madvise(memory: str, mode: str, removal: str, advice: str) -> tuple[int, int, bytes]:
    """The guest's process gives back what is still at the source, touches it, and then all is pushed."""
    from postcopy.kernel import calls
    from postcopy.link import Source

    mapping, guest = make_source(memory, steps_per_second=1, size=SIZE)
    page_size = mapping.region.page_size
    calls.write_memory(mapping.address + SIZE - page_size, TEXT)
    async with make_destination(mode, removal=removal) as destination, Source([mapping], guest) as source:
        migration = asyncio.create_task(source.migrate(str(destination.address), push=False))
        await switched_over(destination, migration)
        last = destination._current.memory.mappings[0].address + SIZE - page_size
        await asyncio.to_thread(calls.advise, last, page_size, getattr(calls, advice))
        seen = await asyncio.to_thread(calls.read_memory, last, len(TEXT))
        await source.start_push()
        await migration
        await destination.migrated()
        assert await asyncio.to_thread(calls.read_memory, last, len(TEXT)) == seen, "a late copy"
        stats = destination.snapshot()
        return stats.pages_removed, stats.pages_resident * page_size, seen


def _advise(memory: str, mode: str, removal: str, advice: str) -> tuple[int, int, bytes]:
    return uvloop.run(madvise(memory, mode, removal, advice))


@pytest.mark.parametrize(
    ("memory", "mode", "removal", "advice"),
    [
        ("shmem", "auto", "discards", "MADV_REMOVE"),
        ("shmem", "minor", "discards", "MADV_REMOVE"),
        ("shmem", "missing", "discards", "MADV_DONTNEED"),
        ("hugetlb-2M", "auto", "discards", "MADV_REMOVE"),
        ("anonymous", "auto", "auto", "MADV_DONTNEED"),
    ],
)
def test_what_the_guest_gives_back_by_madvise_is_zeros(memory, mode, removal, advice, request) -> None:
    if memory == "hugetlb-2M":
        request.getfixturevalue("huge_pages")(memory, 24)
    removed, resident, seen = run_in_child(_advise, memory, mode, removal, advice, deadline=SECONDS)
    assert (removed, resident, seen) == (1, SIZE, bytes(len(TEXT)))


@pytest.mark.parametrize("advice", ["MADV_DONTNEED", "MADV_REMOVE"])
def test_of_shared_memory_nothing_is_lost_where_nobody_says_so(advice: str) -> None:
    removed, resident, seen = run_in_child(_advise, "shmem", "auto", "auto", advice, deadline=SECONDS)
    assert (removed, resident, seen) == (0, SIZE, TEXT)


def test_an_unknown_removal_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown removal 'keep': known are auto, discards"):
        make_destination(removal="keep")


@pytest.mark.parametrize(
    ("memory", "mode"), [("shmem", "auto"), ("shmem", "minor"), ("anonymous", "auto"), ("anonymous", "move")]
)
def test_a_balloon(memory: str, mode: str) -> None:
    pages, removed, wrong = run_in_child(_play, memory, mode, deadline=SECONDS)
    assert wrong == 0
    assert BLANK // 4096 // 4 <= removed <= BLANK // 4096
    assert pages["demand"] + pages["push"] + pages["zero"] == pages["total"] == SIZE // 4096


def _play(memory: str, mode: str) -> tuple[dict, int, int]:
    return uvloop.run(inflate(memory, mode))
