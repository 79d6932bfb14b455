"""The guest of a daemon: how it is described, and how it is checked while it lives here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from postcopy.errors import MigrationFailed, UsageError
from postcopy.guest import WorkloadGuest
from postcopy.guest.state import GUEST_PAGE_BYTES
from postcopy.pages.regions import Layout
from postcopy.session.commands import Finish

CHECK_THREADS = 2
CHECK = "a check"
MIGRATION = "a migration"


class Use:
    """What the guest is used for: one thing at a time, CHECK or MIGRATION, "" for neither; `over` is set for neither.

    Between a look at it and the taking nobody waits for anything, so two requests of one moment cannot both have it.
    """

    def __init__(self) -> None:
        self.what = ""
        self.over = asyncio.Event()
        self.over.set()
        self.ending = False

    @contextmanager
    def take(self, what: str) -> Iterator[None]:
        """Have the guest until the block ends. Raises MigrationFailed or UsageError where it is not to be had."""
        self.check_open()
        if self.what == CHECK and what == MIGRATION:
            raise MigrationFailed("the guest is being checked: try again")
        if self.what:
            raise UsageError(f"{self.what} is running already")
        self.what = what
        self.over.clear()
        try:
            yield
        finally:
            self.what = ""
            self.over.set()

    def check_open(self) -> None:
        """Raise MigrationFailed where nobody may begin anything any more."""
        if self.ending:
            raise MigrationFailed("this agent is ending")

    def refuse(self) -> None:
        """Let nobody have it from now on; whoever has it keeps it until it is over."""
        self.ending = True


def describe_guest(guest: WorkloadGuest) -> dict[str, Any]:
    """Return what `status` shows of a guest, live; lists have one entry a vCPU, `accesses` are the steps made here."""
    return {
        "kind": guest.kind,
        "vcpus": guest.vcpus,
        "steps": guest.steps(),
        "accesses": guest.accesses,
        "trouble": guest.trouble,
        "lost_steps": guest.lost_steps,
        "stall_p99_seconds": [stall.quantile(0.99) for stall in guest.stall_per_vcpu],
    }


def describe_memory(layout: Layout) -> list[dict[str, Any]]:
    """Return what `status` and the report show of the memory."""
    return [
        {"type": region.type, "page_size": region.page_size, "size_bytes": region.size} for region in layout.regions
    ]


def describe_end(finish: Finish | None) -> dict[str, Any] | None:
    """Return what `status` shows of how the latest migration ended."""
    if finish is None:
        return None
    return {
        "outcome": finish.state.value,
        "owner": finish.owner.value if finish.owner else None,
        "text": finish.text,
        "exit_status": finish.exit_status,
    }


async def check_guest(guest: WorkloadGuest, may_run: Callable[[], bool]) -> dict[str, Any]:
    """Stop the guest, compare every byte of its memory, let it go on if it still may run here; return the verdict."""
    checking = asyncio.create_task(asyncio.to_thread(_check, guest))
    try:
        return await asyncio.shield(checking)
    finally:
        await asyncio.wait({checking})  # a thread that reads the guest's memory cannot be called back
        if may_run():
            guest.start()


def _check(guest: WorkloadGuest) -> dict[str, Any]:
    guest.stop()
    result = guest.check(threads=CHECK_THREADS)
    steps = guest.steps()
    return {
        "page_size": GUEST_PAGE_BYTES,
        "pages_checked": result.pages_checked,
        "pages_mismatched": result.pages_mismatched,
        "first_mismatch": result.first_mismatch,
        "steps": steps,
    }
