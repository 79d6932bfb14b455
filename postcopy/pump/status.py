"""What became of a pump, in words: the status block that the C threads leave behind, read by its owner."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from postcopy.pump._pump import lib
from postcopy.wire.frame import FrameRefusal

State = Literal["idle", "running", "complete", "broken", "failed"]

_STATES: dict[int, State] = {
    lib.PUMP_IDLE: "idle",
    lib.PUMP_RUNNING: "running",
    lib.PUMP_COMPLETE: "complete",
    lib.PUMP_FAILED: "failed",
}
_ROLES = {lib.ROLE_URGENT: "urgent", lib.ROLE_PUSH: "push"}
_OPERATIONS = {
    1: "giving the memory's file a page",
    0x12: "a page fault that is none of a missing page of the memory that is served",
    0x14: "following memory that was moved (mremap)",
    0x15: "giving back a page",
    0x8010AA02: "UFFDIO_WAKE",
    0xC028AA03: "UFFDIO_COPY",
    0xC028AA05: "UFFDIO_MOVE",
    0xC020AA04: "UFFDIO_ZEROPAGE",
    0xC020AA07: "UFFDIO_CONTINUE",
    0xC020AA08: "UFFDIO_POISON",
}


@dataclass(frozen=True, slots=True)
class PumpStatus:
    """`error` is None unless `state` is "failed" or "broken"; then it is one line for a person.

    A pump that is broken has lost a connection, and goes on with new ones. `resident`: every page came, also where it
    failed after that.
    """

    state: State
    error: str | None
    resident: bool = False


def read_status(status: Any, broken: Any, other_agent: str) -> PumpStatus:
    """Read a pump's two `struct pump_status`; `other_agent` names who is at the other end of the connections."""
    state = _STATES[status.state]
    if state == "failed":
        return PumpStatus(state, _explain(status, other_agent), bool(status.completed))
    if state == "running" and _STATES[broken.state] == "failed":
        return PumpStatus("broken", _explain(broken, other_agent))
    return PumpStatus(state, None, state == "complete")


def _explain(status: Any, other_agent: str) -> str:
    connection = f"the {_ROLES.get(status.role, '?')} connection"
    where = f"region {status.region}, offset {status.offset:#x}, length {status.length:#x}"
    operation = _OPERATIONS.get(status.operation, f"operation {status.operation:#x}")
    words: dict[int, Callable[[], str]] = {
        lib.FAILURE_CLOSED: lambda: f"{connection} was closed by the {other_agent}",
        lib.FAILURE_SOCKET: lambda: f"{connection} to the {other_agent} broke: {_errno(status.number)}",
        lib.FAILURE_SILENT: lambda: f"nothing was heard from the {other_agent} on {connection} any more",
        lib.FAILURE_FRAME: lambda: (
            f"the {other_agent} sent a frame on {connection} that is refused "
            f"({FrameRefusal(status.number).name.lower()}): {where}"
        ),
        lib.FAILURE_INCOMPLETE: lambda: (
            f"the {other_agent} says that everything was sent, and a page never came: {where}"
        ),
        lib.FAILURE_FILE: lambda: (
            f"the file behind the memory cannot be read: {_FILE.get(status.number) or _errno(status.number)}: {where}"
        ),
        lib.FAILURE_EARLY: lambda: f"the {other_agent} asked for a page while the guest still ran here",
        lib.FAILURE_KERNEL: lambda: f"{operation} failed with {_errno(status.number)} at {where}",
    }
    return words[status.failure]()


_FILE = {0: "it has become shorter", errno.ESTALE: "it was written to while it was served"}


def _errno(number: int) -> str:
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
