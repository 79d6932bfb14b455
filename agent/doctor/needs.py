"""What was asked for with --need: TYPE:MODE enters, whether this host has it leaves, with the command that mends it."""

from __future__ import annotations

from typing import Any

from agent.doctor.problems import mend_opening, mend_pool
from postcopy.errors import HostError, PostcopyError, UsageError
from postcopy.kernel import MEMORY_TYPES, Ioctl, MemoryType, Mode, Need, Way, memory_type, require
from postcopy.kernel.abi import NO_IOCTLS
from postcopy.kernel.hugetlb import Hugetlb

# What may be asked for: memory is registered so, pages of it are placed in this way, these ioctls work besides. A page
# that is in the file and not mapped is a minor fault, one that is not in the file a missing one: who wants minor faults
# gets both.
MODES: dict[str, tuple[Mode, tuple[Way, ...], Ioctl]] = {
    "missing": (Mode.MISSING, (Way.COPY,), NO_IOCTLS),
    "minor": (Mode.MISSING | Mode.MINOR, (Way.CONTINUE,), NO_IOCTLS),
    "move": (Mode.MISSING, (Way.MOVE,), NO_IOCTLS),
    "wp": (Mode.WP, (), Ioctl.WRITEPROTECT),
}


def parse_need(text: str) -> tuple[str, Need]:
    """Return what TYPE:MODE asks for, with the text; UsageError where there is no such type or mode."""
    name, colon, modes = text.rpartition(":")
    if not colon:
        raise UsageError(
            f"--need {text!r} is not understood: write it TYPE:MODE, like shmem:minor; "
            f"types are {', '.join(MEMORY_TYPES)}, modes {', '.join(MODES)}"
        )
    kind = memory_type(name)
    if modes not in MODES:
        raise UsageError(f"--need {text!r}: unknown mode {modes!r}: of {name} may be asked {_askable(kind)}")
    return text, Need(kind, *MODES[modes])


def _askable(kind: MemoryType) -> str:
    """Say which modes there are of a memory type, on one kernel or another."""
    return ", ".join(
        name
        for name, (modes, ways, _) in MODES.items()
        if modes in kind.modes and all(way in kind.ways for way in ways)
    )


def check(asked: tuple[str, Need], host: dict[str, Any]) -> dict[str, Any]:
    """Try it: registered, its ioctls performed, and a page of the memory to be had now."""
    text, need = asked
    reason, mend = None, None
    try:
        require(needs=[need])
    except UsageError as never:
        reason = f"{never}, on no kernel; of {need.type.name} may be asked {_askable(need.type)}"
    except PostcopyError as refused:
        reason = str(refused)
        mend = mend_opening(host)
    else:
        try:
            need.type.check_room(need.type.page_size)
        except HostError as short:
            reason = str(short)
            mend = _mend_room(need.type)
    return {"need": text, "met": reason is None, "reason": reason, "mend": mend}


def _mend_room(kind: MemoryType) -> str | None:
    if not isinstance(kind, Hugetlb):
        return None
    try:
        return mend_pool(kind.page_size, kind.pool().total + 1)
    except HostError:
        return None  # this machine has no pages of that size
