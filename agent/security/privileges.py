"""What a daemon may do, cut down to what it needs: capabilities it never uses are given up before it does anything.

Nothing enters; what is left are the capabilities in KEPT that this process had. Done first and on the only thread there
is, for each thread has its own set and passes it on: what is given up here no thread of the daemon ever has.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

# prctl(2), capabilities(7).
_PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 23, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
_HEADER, _SETS = struct.Struct("=Ii"), struct.Struct("=6I")

CAP_NET_BIND_SERVICE, CAP_SYS_PTRACE, CAP_SYS_NICE = 10, 19, 23

KEPT = {
    CAP_SYS_PTRACE: "opens a userfaultfd that serves faults of the kernel, too, for each guest that comes",
    CAP_SYS_NICE: "lets the thread that serves faults in before others",
    CAP_NET_BIND_SERVICE: "listens on a port below 1024, if that is asked for",
}


def drop() -> None:
    """Give up all capabilities but KEPT, for good: neither this process nor what it starts can have them again.

    Where the kernel refuses a part of it (a user who has none to give up may not touch the bounding set) there is
    nothing to be had by it either, and the rest is done all the same.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(_last_capability() + 1):
        if capability not in KEPT and libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) == 1:
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = _HEADER.pack(_CAPABILITY_VERSION_3, 0)
    before = ctypes.create_string_buffer(_SETS.size)
    if libc.capget(header, before):
        return
    # Twice 32 bits of each: effective, permitted, inheritable.
    low = _SETS.unpack(before.raw)[:3]
    kept = sum(1 << capability for capability in KEPT)
    if libc.capset(header, _SETS.pack(low[0] & kept, low[1] & kept, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), f"capabilities: {os.strerror(ctypes.get_errno())}")


def _last_capability() -> int:
    """Return the highest capability that the kernel knows."""
    try:
        return int(Path("/proc/sys/kernel/cap_last_cap").read_bytes())
    except (OSError, ValueError):
        return 63
