"""What was asked for with --need: TYPE:MODE enters, whether this host has it leaves, with the command that mends it."""

from __future__ import annotations

from typing import Any

from agent.doctor.problems import mend_opening, mend_pool
from postcopy.errors import HostError, PostcopyError, UsageError
from postcopy.kernel import MemoryType, Mode, Need, Way, memory_type, require
from postcopy.kernel.hugetlb import Hugetlb

# What a mode is for: it is registered so, and pages of it are placed in this way. A page that is in the file and not
# mapped is a minor fault, one that is not in the file a missing one: who wants minor faults gets both.
MODES: dict[str, tuple[Mode, tuple[Way, ...]]] = {
    "missing": (Mode.MISSING, (Way.COPY,)),
    "minor": (Mode.MISSING | Mode.MINOR, (Way.CONTINUE,)),
    "wp": (Mode.WP, ()),
}


def parse_need(text: str) -> tuple[str, Need]:
    """Return what TYPE:MODE asks for, with the text; UsageError where there is no such type or mode."""
    name, colon, modes = text.rpartition(":")
    if not colon:
        raise UsageError(f"--need {text!r} is not understood: write it TYPE:MODE, like shmem:minor")
    kind = memory_type(name)
    if modes not in MODES:
        raise UsageError(f"--need {text!r}: unknown mode {modes!r}: known are {', '.join(MODES)}")
    return text, Need(kind, *MODES[modes])


def check(asked: tuple[str, Need], host: dict[str, Any]) -> dict[str, Any]:
    """Try it: registered, its ioctls granted, and a page of the memory to be had now."""
    text, need = asked
    reason, mend = None, None
    try:
        require(needs=[need])
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
