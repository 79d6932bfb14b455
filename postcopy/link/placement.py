"""How pages are placed, for each mode and kind of memory: the one table of it.

`auto` takes what was measured to be cheapest: a run of 4 KiB pages is placed faster by COPY out of a staging buffer
that is hot in the cache than through the alias, whose every first touch is a fault of its own; a huge page is large
enough for the copy itself to be what costs, so it is received where it stays. MINOR is registered beside MISSING even
where nothing is placed by CONTINUE: a page that is in the file and not mapped would otherwise come without a message.

Anonymous memory is placed by COPY, too: MOVE itself is nearly free, and yet what it gives away must be allocated and
cleared again, which costs more than the copy, and for a single page it interrupts every CPU that runs the guest (see
the pump's README). A forced mode is refused for memory that cannot be placed so, rather than ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

from postcopy.errors import UsageError
from postcopy.pump.regions import Placement


@dataclass(frozen=True, slots=True)
class Handling:
    """How one kind of memory is handled: what is trapped, whether there is an alias, and what places which page."""

    minor: bool
    alias: bool
    demand: Placement
    push: Placement


_COPY = Handling(minor=True, alias=True, demand=Placement.COPY, push=Placement.COPY)
_CONTINUE = Handling(minor=True, alias=True, demand=Placement.CONTINUE, push=Placement.CONTINUE)
_MISSING = Handling(minor=False, alias=False, demand=Placement.COPY, push=Placement.COPY)
_MOVE = Handling(minor=False, alias=False, demand=Placement.MOVE, push=Placement.MOVE)

HANDLINGS: dict[str, dict[str, Handling]] = {
    "auto": {
        "shmem": _COPY,
        "tmpfs": _COPY,
        "hugetlb": _CONTINUE,
        "hugetlbfs": _CONTINUE,
        "anonymous": _MISSING,
        "guest_memfd": _CONTINUE,
    },
    "minor": dict.fromkeys(("shmem", "tmpfs", "hugetlb", "hugetlbfs", "guest_memfd"), _CONTINUE),
    "missing": dict.fromkeys(("shmem", "tmpfs", "hugetlb", "hugetlbfs", "anonymous", "guest_memfd"), _MISSING),
    "move": {"anonymous": _MOVE},
}

MODES = tuple(HANDLINGS)

# What it means where the guest gives pages of shared memory back by madvise(2) that are not here yet.
REMOVALS = ("auto", "discards")


def known_mode(mode: str) -> str:
    """Return the mode if there is one of this name; UsageError names those that there are."""
    if mode not in HANDLINGS:
        raise UsageError(f"unknown mode {mode!r}: known are {', '.join(MODES)}")
    return mode


def known_removal(removal: str) -> str:
    """Return what a removal means if it is known; UsageError names what there is."""
    if removal not in REMOVALS:
        raise UsageError(f"unknown removal {removal!r}: known are {', '.join(REMOVALS)}")
    return removal


def traps_handed_over(mode: str) -> bool:
    """Say whether each first touch of memory that is handed over is trapped; UsageError where a mode says neither.

    All of it is there and nothing is to be placed: `auto` leaves faults to the kernel, `minor` serves each by CONTINUE.
    """
    if known_mode(mode) not in {"auto", "minor"}:
        raise UsageError(f"memory that is handed over is not copied, so mode {mode} cannot be had: auto or minor can")
    return mode == "minor"


def handling(mode: str, memory_type: str) -> Handling:
    """Return how memory of this type ("shmem", "hugetlb-2M") is handled in a mode; UsageError if it is not."""
    kind = memory_type.partition("-")[0]
    kinds = HANDLINGS[known_mode(mode)]
    if kind not in kinds:
        able = ", ".join(other for other in MODES if kind in HANDLINGS[other])
        raise UsageError(f"memory of type {memory_type} cannot be migrated in mode {mode}, only in: {able}")
    return kinds[kind]
