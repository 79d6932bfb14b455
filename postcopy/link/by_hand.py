"""What a person may do to a migration after its switchover, from either side: pause it, have it go on, give it up.

The interpreter of the latest migration enters, None where there was none; an event for its machine leaves, or a
UsageError that says why this makes no sense now.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from postcopy.errors import UsageError
from postcopy.link.interpreter import Interpreter
from postcopy.session.events import CancelAsked, LoseAsked, PauseAsked, ResumeAsked
from postcopy.session.states import ENDED, SWITCHED, State

InterpreterT = TypeVar("InterpreterT", bound=Interpreter)

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


class Steered(Generic[InterpreterT]):
    """A side with one migration at a time, the latest being `_current`, as people steer and see it."""

    _current: InterpreterT | None = None

    @property
    def state(self) -> State:
        """Where the latest migration stands."""
        return State.NONE if self._current is None else self._current.machine.state

    @property
    def pause_state(self) -> dict[str, Any] | None:
        """Why the latest migration is paused (text), for how many seconds, and whether it is held by hand."""
        return describe(self._current)

    @property
    def reconnects(self) -> int:
        """How often the latest migration was resumed."""
        machine: Any = None if self._current is None else self._current.machine
        return 0 if machine is None else machine.reconnects

    def cancel(self, text: str = "cancelled by the user") -> bool:
        """Ask the running migration to end; False where there is none, or the guest is the destination's already."""
        current = self._current
        if current is None or current.finish is not None or current.machine.state in {*SWITCHED, *ENDED}:
            return False
        current.post(CancelAsked(current.now(), text))
        return True

    def pause(self) -> None:
        """Close the connections of a migration that has switched over, until resume(). UsageError: there is none."""
        pause(self._current)

    def lose(self, text: str = "given up by the user", *, paused: bool = True) -> None:
        """Give up the pages that are still at the source of a `paused` migration: they come no more. UsageError."""
        lose(self._current, text, paused=paused)
