"""A guest's balloon during a whole migration: what it gives back is not fetched, and all the rest arrives."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from tests.child import run_in_child
from tests.link.test_library import make_destination, make_source

SIZE = 16 << 20
BLANK = SIZE // 8  # at the end of the memory: the guest leaves it blank
SECONDS = 25


async def inflate(memory: str, mode: str) -> tuple[dict, int, int]:
    from postcopy.link import Source

    mapping, guest = make_source(memory, size=SIZE)
    async with make_destination(mode) as destination, Source([mapping], guest) as source:
        migration = asyncio.create_task(source.migrate(str(destination.address), push=False))
        while destination.state != "postcopy-active":
            await asyncio.sleep(0.001)
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
