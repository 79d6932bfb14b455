"""A backend in a process of its own beside the guest, through whole migrations: it sees what the guest sees."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from postcopy.errors import HostError, UsageError
from tests.backend import Backend
from tests.child import run_in_child
from tests.link.test_library import make_destination, make_source, switched_over

SIZE = 16 << 20
BLANK = SIZE // 8  # at the end: the guest leaves it blank, and nobody touches it; it keeps the migration open
SECONDS = 40


@pytest.fixture(autouse=True)
def _pool(request: pytest.FixtureRequest) -> None:
    if "hugetlb" in request.node.name:
        request.getfixturevalue("huge_pages")("hugetlb-2M", 20)


async def beside_the_guest(memory: str, mode: str) -> tuple[dict[str, Any], int, int]:
    """Restore the guest together with a backend; both touch what is still at the source, then all is pushed."""
    from postcopy.guest import Guest
    from postcopy.kernel import Userfaultfd, calls
    from postcopy.link import Source

    backends: list[Backend] = []

    def restore(mappings: Any, state: object) -> Guest:
        backend = Backend(mappings[0].fd, SIZE, memory)
        with pytest.raises(HostError, match="region 0"):
            destination.add_view(backend.uffd, {0: backend.address + (64 << 30)})
        with pytest.raises(UsageError, match="there is no region 1"):
            destination.add_view(backend.uffd, {1: backend.address})
        destination.add_view(backend.uffd, {0: backend.address})
        backends.append(backend)
        return Guest.restore(mappings, state)

    mapping, guest = make_source(memory, steps_per_second=500, size=SIZE)
    page_size = mapping.region.page_size
    destination = make_destination(mode, restore)
    with pytest.raises(UsageError, match="no guest's memory"):
        destination.add_view(Userfaultfd.from_fd(-1), {0: 4096})
    async with destination, Source([mapping], guest) as source:
        migration = asyncio.create_task(source.migrate(str(destination.address), push=False))
        await switched_over(destination, migration)
        (backend,) = backends
        pages = range(0, (SIZE - BLANK) // page_size, max(1, SIZE // page_size // 32))
        before = {page: calls.read_memory(mapping.address + page * page_size, 8) for page in pages}
        seen = {page: (await asyncio.to_thread(backend.read, page))[:8] for page in pages}
        # The guest writes elsewhere in these pages: a word of each vCPU; what the source had there is not lost.
        assert all((seen[page] == bytes(8)) == (before[page] == bytes(8)) for page in pages)
        assert any(seen[page] != bytes(8) for page in pages)
        assert not migration.done()
        await source.start_push()
        report = await migration
        await destination.migrated()
        arrived: Any = destination.guest
        await asyncio.to_thread(arrived.stop)
        result = await asyncio.to_thread(arrived.check)
        # All is here, nothing is trapped any more: what is in the file is what both see, also where nobody has been.
        there = destination._current.memory.mappings[0]
        for page in range(0, SIZE // page_size, max(1, SIZE // page_size // 512)):
            at = there.address + page * page_size
            assert await asyncio.to_thread(backend.read, page) == calls.read_memory(at, 16), page
        with Backend(there.fd, SIZE, memory) as late:
            destination.add_view(late.uffd, {0: late.address})
            assert await asyncio.to_thread(late.read, 1) == await asyncio.to_thread(backend.read, 1)
        backend.process.kill()
        return report["pages"], result.pages_checked, result.pages_mismatched


def play(story: Callable[..., Any], *arguments: str) -> Any:
    return uvloop.run(story(*arguments))


@pytest.mark.parametrize(
    ("memory", "mode"),
    [("shmem", "auto"), ("shmem", "minor"), ("shmem", "missing"), ("hugetlb-2M", "auto"), ("hugetlb-2M", "missing")],
)
def test_a_backend_beside_the_guest(memory: str, mode: str) -> None:
    pages, checked, wrong = run_in_child(play, beside_the_guest, memory, mode, deadline=SECONDS)
    assert (checked, wrong) == (SIZE // 4096, 0)
    assert pages["demand"] + pages["push"] + pages["zero"] == pages["total"]


async def events() -> None:
    from postcopy.kernel import Feature, Userfaultfd
    from postcopy.link import Source

    mapping, guest = make_source("anonymous", steps_per_second=500, size=1 << 20)
    async with make_destination() as destination, Source([mapping], guest) as source:
        migration = asyncio.create_task(source.migrate(str(destination.address), push=False))
        await switched_over(destination, migration)
        with Userfaultfd.open(Feature.EVENT_FORK) as uffd, pytest.raises(UsageError, match="without EVENT_FORK"):
            destination.add_view(uffd, {0: 4096})
        with Userfaultfd.open() as uffd:
            with pytest.raises(UsageError, match=r"region 0 \(anonymous\) has no file"):
                destination.add_view(uffd, {0: 4096})
            with pytest.raises(UsageError, match="without a region"):
                destination.add_view(uffd, {})
        await source.start_push()
        await migration
        await destination.migrated()


def test_what_cannot_be_served_is_refused() -> None:
    run_in_child(play, events, deadline=SECONDS)
