"""What became of a pump, in words: the status block that the C threads leave behind, read by its owner."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any, Literal

from postcopy.pump._pump import lib
from postcopy.wire.frame import FrameRefusal

State = Literal["idle", "running", "complete", "failed"]

_STATES: dict[int, State] = {
    lib.PUMP_IDLE: "idle",
    lib.PUMP_RUNNING: "running",
    lib.PUMP_COMPLETE: "complete",
    lib.PUMP_FAILED: "failed",
}
_ROLES = {lib.ROLE_URGENT: "urgent", lib.ROLE_PUSH: "push"}
_OPERATIONS = {
    0x15: "giving back a page",
    0x8010AA02: "UFFDIO_WAKE",
    0xC028AA03: "UFFDIO_COPY",
    0xC028AA05: "UFFDIO_MOVE",
    0xC020AA04: "UFFDIO_ZEROPAGE",
    0xC020AA07: "UFFDIO_CONTINUE",
}


@dataclass(frozen=True, slots=True)
class PumpStatus:
    """`error` is None unless `state` is "failed"; then it is one line for a person."""

    state: State
    error: str | None


def read_status(status: Any, other_agent: str) -> PumpStatus:
    """Read a `struct pump_status`; `other_agent` names who is at the other end of the connections."""
    state = _STATES[status.state]
    return PumpStatus(state, _explain(status, other_agent) if state == "failed" else None)


def _explain(status: Any, other_agent: str) -> str:
    connection = f"the {_ROLES.get(status.role, '?')} connection"
    where = f"region {status.region}, offset {status.offset:#x}, length {status.length:#x}"
    if status.failure == lib.FAILURE_CLOSED:
        return f"{connection} was closed by the {other_agent}"
    if status.failure == lib.FAILURE_SOCKET:
        return f"{connection} to the {other_agent} broke: {_errno(status.number)}"
    if status.failure == lib.FAILURE_FRAME:
        reason = FrameRefusal(status.number).name.lower()
        return f"the {other_agent} sent a frame on {connection} that is refused ({reason}): {where}"
    if status.failure == lib.FAILURE_INCOMPLETE:
        return f"the {other_agent} says that everything was sent, and a page never came: {where}"
    if status.failure == lib.FAILURE_EARLY:
        return f"the {other_agent} asked for a page while the guest still ran here"
    operation = _OPERATIONS.get(status.operation, f"operation {status.operation:#x}")
    return f"{operation} failed with {_errno(status.number)} at {where}"


def _errno(number: int) -> str:
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
