"""What a person may do to a migration after its switchover, from either side: pause it, have it go on, give it up.

The interpreter of the latest migration enters, None where there was none; an event for its machine leaves, or a
UsageError that says why this makes no sense now.
"""

from __future__ import annotations

from typing import Any

from postcopy.errors import UsageError
from postcopy.link.interpreter import Interpreter
from postcopy.session.events import LoseAsked, PauseAsked, ResumeAsked
from postcopy.session.states import SWITCHED, State

PAUSED = SWITCHED - {State.POSTCOPY_ACTIVE}


def pause(current: Interpreter | None) -> None:
    """Close the migration's connections, and let none be made until it is asked to resume."""
    running = _switched(current, "paused")
    running.post(PauseAsked(running.now(), "somebody asked for it"))


def resume(current: Interpreter | None) -> None:
    """Have a paused migration go on: now, and from here on by itself."""
    running = _switched(current, "resumed")
    if running.machine.state not in PAUSED:
        raise UsageError("the migration cannot be resumed: it is not paused")
    running.post(ResumeAsked(running.now()))


def lose(current: Interpreter | None, text: str, *, paused: bool = True) -> None:
    """Give up what the other side still has; only while it is `paused`, unless this side ends."""
    running = _switched(current, "given up")
    if paused and running.machine.state not in PAUSED:
        raise UsageError("the migration cannot be given up: it is not paused, so nothing is lost")
    running.post(LoseAsked(running.now(), text))


def describe(current: Interpreter | None) -> dict[str, Any] | None:
    """Return why the latest migration is paused, how long, whether by hand, and failed attempts; None: it is not."""
    if current is None or current.finish is not None or current.machine.state not in PAUSED:
        return None
    machine: Any = current.machine
    return {
        "text": machine.trouble,
        "seconds": current.now() - machine.paused_at,
        "held": machine.held,
        "attempts": machine.attempts,
    }


def _switched(current: Interpreter | None, what: str) -> Interpreter:
    if current is None or current.finish is not None or current.machine.state not in SWITCHED:
        raise UsageError(f"no migration can be {what}: none has switched over and misses pages")
    if not getattr(current.machine, "recoverable", False):
        raise UsageError(f"this migration cannot be {what}: an agent knows no recovery, or the memory was handed over")
    return current
