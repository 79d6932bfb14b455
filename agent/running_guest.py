"""The guest of a daemon: how it is described, and how it is checked while it lives here."""

from __future__ import annotations

import asyncio
from typing import Any

from postcopy.guest import Guest
from postcopy.pages.regions import Layout

CHECK_THREADS = 2


def describe_guest(guest: Guest) -> dict[str, Any]:
    """Return what `status` shows of a guest, live; lists have one entry a vCPU, `accesses` are the steps made here."""
    return {
        "kind": guest.kind,
        "vcpus": guest.vcpus,
        "steps": guest.steps(),
        "accesses": guest.accesses,
        "stall_p99_seconds": [stall.quantile(0.99) for stall in guest.stall_per_vcpu],
    }


def describe_memory(layout: Layout) -> list[dict[str, Any]]:
    """Return what `status` and the report show of the memory."""
    return [
        {"type": region.type, "page_size": region.page_size, "size_bytes": region.size} for region in layout.regions
    ]


async def check_guest(guest: Guest) -> dict[str, Any]:
    """Stop the guest, compare every byte of its memory, let it go on; return the verdict."""
    return await asyncio.to_thread(_check, guest)


def _check(guest: Guest) -> dict[str, Any]:
    try:
        guest.stop()
        result = guest.check(threads=CHECK_THREADS)
        steps = guest.steps()
    finally:
        guest.start()
    return {
        "pages_checked": result.pages_checked,
        "pages_mismatched": result.pages_mismatched,
        "first_mismatch": result.first_mismatch,
        "steps": steps,
    }
