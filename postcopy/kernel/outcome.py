"""Outcomes: what a placing ioctl came to, said in words that are also the labels of the metrics.

In: the result of an ioctl and the field into which the kernel wrote bytes done or -errno. Out: a Placed, or a
KernelError for what the ioctl's documentation does not name as something that happens to a correct program.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from errno import EAGAIN, EBUSY, EEXIST, ENOENT, ESRCH

from postcopy.errors import KernelError


class Outcome(StrEnum):
    """What became of the range.

    PLACED: all of it is done. PRESENT: the first page is there already (EEXIST): nothing was done and nobody was
    woken. RETRY: done up to `bytes` (maybe 0); go on behind that, after the waiting events have been read (EAGAIN).
    GONE: the address space ended (ESRCH), or the range is no longer registered there (ENOENT). BUSY: only from MOVE:
    the page is pinned, shared by a fork or merged (EBUSY); it must be copied.
    """

    PLACED = "placed"
    PRESENT = "present"
    RETRY = "retry"
    GONE = "gone"
    BUSY = "busy"


@dataclass(frozen=True, slots=True)
class Placed:
    """An outcome and how many bytes of the range, from its start, are done."""

    outcome: Outcome
    bytes: int


_OUTCOMES = {
    EEXIST: Outcome.PRESENT,
    EAGAIN: Outcome.RETRY,
    ESRCH: Outcome.GONE,
    ENOENT: Outcome.GONE,
}


def settle(operation: str, result: int, address: int, length: int, done: int, *, movable: bool = False) -> Placed:
    """Turn an ioctl's `result` (0 or -errno) and its field `done` into an outcome.

    The errno decides; `done` only counts bytes, because the kernel leaves it alone when it fails early.
    """
    if result >= 0:
        return Placed(Outcome.PLACED, length)
    outcome = Outcome.BUSY if movable and result == -EBUSY else _OUTCOMES.get(-result)
    if outcome is None:
        raise KernelError(operation, -result, f"{length} bytes at {address:#x}")
    return Placed(outcome, max(done, 0))
