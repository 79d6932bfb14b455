"""What a test says to changing.c, which is before the C library of a child process (fixture `changing_kernel`)."""

from __future__ import annotations

import ctypes


def changes(left: int, *, of: int = 0) -> None:
    """Have the kernel refuse to place so many times from now on, -1: until told otherwise; `of`: by that ioctl only."""
    library = ctypes.CDLL(None)
    ctypes.c_uint.in_dll(library, "changes_of").value = of
    ctypes.c_int.in_dll(library, "changes_left").value = left


def leap(seconds: int) -> None:
    """Let so much time pass at once."""
    ctypes.c_int.in_dll(ctypes.CDLL(None), "clock_leap_s").value = seconds


def hold(held: bool) -> None:
    """Have whoever places a page from now on stay in the kernel, or let all of them go on."""
    ctypes.c_int.in_dll(ctypes.CDLL(None), "changes_held").value = held


def held() -> int:
    """Return how many are in the kernel to place a page."""
    return ctypes.c_int.in_dll(ctypes.CDLL(None), "changes_waiting").value


def take(seconds: int) -> None:
    """Have the kernel refuse every second time to place pages, and so much time pass by it."""
    ctypes.c_int.in_dll(ctypes.CDLL(None), "changes_take_s").value = seconds
