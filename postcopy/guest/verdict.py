"""The verdict on an emulated guest's memory: every byte is what the seed and the step counts make it, or is not.

In: a stopped guest in C, which pages to look at. Out: how many were checked, how many were wrong, the first of them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from postcopy.errors import HostError, KernelError
from postcopy.guest._guest import ffi, lib

_NO_PAGE = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found, in guest pages of 4096 bytes numbered through all regions; None: no page mismatched."""

    pages_checked: int
    pages_mismatched: int
    first_mismatch: int | None


def check_memory(guest: Any, total: int, pages: bytes | None, threads: int) -> CheckResult:
    """Compare the guest pages whose bit is set in `pages` (None: all) out of `total`; see Guest.check."""
    if pages is not None and len(pages) != (total + 7) // 8:
        raise ValueError(f"{len(pages)} bytes are no bitmap of {total} guest pages")
    cuts = [total * i // threads for i in range(threads + 1)]
    # The threads are Python's, the comparing is C without the GIL.
    with _expectations(guest) as check, ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda first, stop: _check_range(check, first, stop, pages), cuts, cuts[1:]))
    firsts = [part.first_mismatch for part in parts if part.first_mismatch is not None]
    return CheckResult(
        sum(part.pages_checked for part in parts),
        sum(part.pages_mismatched for part in parts),
        min(firsts, default=None),
    )


@contextmanager
def _expectations(guest: Any) -> Iterator[Any]:
    out = ffi.new("struct check **")
    number = lib.guest_check(guest, out)
    if number == errno.ENOMEM:
        raise HostError("guest: no memory for the check (4 bytes per page and vCPU)")
    raise_for("guest_check", number)
    try:
        yield out[0]
    finally:
        lib.check_destroy(out[0])


def _check_range(check: Any, first: int, stop: int, pages: bytes | None) -> CheckResult:
    result = ffi.new("struct check_result *")
    bits = ffi.NULL if pages is None else ffi.from_buffer("uint8_t[]", pages)
    raise_for("reading a hole's file", lib.check_range(check, first, stop, bits, result))
    mismatch = None if result.first_mismatch == _NO_PAGE else result.first_mismatch
    return CheckResult(result.pages_checked, result.pages_mismatched, mismatch)


def raise_for(operation: str, number: int) -> None:
    """Raise what the errno of a call into the guest's C means; 0: nothing."""
    if number == errno.EBUSY:
        raise RuntimeError("the guest is running: stop it first")
    if number:
        raise KernelError(operation, number)
