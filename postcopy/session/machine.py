"""What the two machines share: events in, a look into the table, commands out.

A table is a dict: (step, key) -> (next step, action). A step is finer than a state (`setup` has several); the key
names what happened: an event's class, a message's class, or a word of the machine's own where the same event can mean
two things (`Elapsed` and `LimitElapsed`). An action is a function (machine, subject) -> commands, the subject being the
message that was received or else the event; it may note facts on the machine, but never chooses the next step: the
table does. What the table does not list is illegal: ProtocolError where
the other side sent it, SessionError where this side made the mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from typing import Any, ClassVar, Generic, Self, TypeVar

from postcopy.errors import PostcopyError, ProtocolError
from postcopy.session.commands import Command, Note
from postcopy.session.events import Elapsed, Event, Received, WorkFailed
from postcopy.session.states import ENDED, State

StepT = TypeVar("StepT", bound=StrEnum)
MachineT = TypeVar("MachineT", bound="Machine[Any]")
Table = Mapping[tuple[StepT, str], tuple[StepT, Callable[[MachineT, Any], list[Command]]]]


class SessionError(PostcopyError):
    """An event that cannot happen in this step: a mistake of ours, never the other side's."""


class Machine(Generic[StepT]):
    """One side of one migration; `step`, `state` and `deadline` are for reading.

    `deadline` is the `now` at which the interpreter owes the machine an `Elapsed`, None: it waits for no one. `version`
    is the protocol's, 0 until it is agreed on; `migration_id` is empty until both sides know it.
    """

    table: ClassVar[Any]
    states: ClassVar[Mapping[Any, State]]
    patience: ClassVar[Mapping[Any, float]]
    """Seconds that a step may take from the moment it was entered."""
    lingering: ClassVar[frozenset[Any]] = frozenset()
    """Steps that people may see as the end they lead to, in which the other side is still to be heard."""

    def __init__(self, step: StepT) -> None:
        self.step = step
        self.now = 0.0
        self.version = 0
        self.migration_id = b""
        self.deadline: float | None = None

    @property
    def state(self) -> State:
        """The state as people see it."""
        return self.states[self.step]

    @property
    def ended(self) -> bool:
        """Whether nothing can happen any more."""
        return self.states[self.step] in ENDED and self.step not in self.lingering

    def give_up(self, failure: WorkFailed) -> list[Command]:
        """End at once, after a mistake that no table foresaw: the step's own way out, whoever owns the guest there."""
        raise NotImplementedError

    def handle(self: Self, event: Event) -> list[Command]:
        """Take one event, go where the table says, return what is to be done, in order.

        Raises ProtocolError for a message that the other side may not send now; the machine has not moved
        then, and the interpreter hands it `Broken`. After the end everything is late and leads to nothing.
        """
        if self.ended:
            return []
        if isinstance(event, Elapsed) and (self.deadline is None or event.now < self.deadline):
            return []  # a timer that was set for an earlier step
        key = self.key(event)
        entry = self.table.get((self.step, key))
        if entry is None:
            raise self._illegal(event, key)
        following, action = entry
        self.now = event.now
        commands: list[Command] = action(self, event.message if isinstance(event, Received) else event)
        entered = following is not self.step
        self.step = following
        self.deadline = self._deadline(event.now, entered)
        return commands

    def key(self, event: Event) -> str:
        """Name what happened, as the table's rows are named."""
        if isinstance(event, Received):
            return type(event.message).__name__
        return type(event).__name__

    def _deadline(self, now: float, entered: bool) -> float | None:
        """When the step in which the machine now is has taken too long."""
        if not entered:
            return self.deadline
        patience = self.patience.get(self.step)
        return None if patience is None else now + patience

    def _illegal(self, event: Event, key: str) -> PostcopyError:
        if isinstance(event, Received):
            return ProtocolError(f"{type(event.message).__name__} is not allowed in state {self.state} ({self.step})")
        return SessionError(f"{key} cannot happen in state {self.state} ({self.step})")


class PausingMachine(Machine[StepT]):
    """A machine whose migration may outlive its connections once it is `active`, as either side has it.

    `give_up_seconds` is how long a pause may last, None: for ever. Where the migration is not `recoverable` what ends a
    connection severs it.
    """

    active: ClassVar[Any]
    pauses: ClassVar[Collection[Any]]
    """Steps of a migration that is paused, or on its way back."""
    severs: ClassVar[Collection[str]]
    """What ends a connection, by the keys of the table."""

    def __init__(self, step: StepT, give_up_seconds: float | None) -> None:
        super().__init__(step)
        self.give_up_seconds = give_up_seconds
        self.heard_at = 0.0
        self.paused_at = 0.0
        self.held = False  # paused until somebody on this side asks to go on
        self.attempts = 0  # to reconnect, in a row, of a side that dials
        self.reconnects = 0
        self.trouble = ""  # why it is paused, for people
        self.told = False  # and that attempts fail for that reason

    @property
    def recoverable(self) -> bool:
        """Whether it outlives its connections."""
        raise NotImplementedError

    @property
    def give_up_at(self) -> float | None:
        """When a pause has lasted too long."""
        if self.give_up_seconds is None or self.step not in self.pauses:
            return None
        return self.paused_at + self.give_up_seconds

    def failed(self, why: str) -> list[Command]:
        """Take an attempt to come back for failed, and say why: once, and again when it changes."""
        self.attempts += 1
        said = self.told and why == self.trouble
        self.trouble, self.told = why, True
        return [] if said else [Note(f"paused still: {why}; it is tried again and again")]

    def key(self, event: Event) -> str:
        """Tell a pause that has lasted too long, and an end that is one."""
        if isinstance(event, Elapsed) and self.give_up_at is not None and event.now >= self.give_up_at:
            return "GiveUpElapsed"
        name = self._late_key(event) or self._key(event)
        return "Severed" if self.step is self.active and not self.recoverable and name in self.severs else name

    def _late_key(self, event: Event) -> str:
        """Name what means something else once the guest has left; nothing for all else."""
        raise NotImplementedError

    def _key(self, event: Event) -> str:
        """Name what means something of its own on this side, or else what happened."""
        return super().key(event)
