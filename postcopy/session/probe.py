"""The source's side of a probe: asks a destination what would come of a migration, and no guest is involved.

In come the user's wish and the destination's messages; out go commands. HELLO and WELCOME are those of a migration,
PROBE takes the place of LAYOUT_OFFER, and with its answer all is over.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from postcopy.limits import ANSWER_SECONDS, DIAL_SECONDS, PREPARE_SECONDS
from postcopy.session.commands import CloseLinks, Command, Connect, Finish, Send
from postcopy.session.events import Broken, Event, Received, Started, WorkFailed
from postcopy.session.machine import Machine
from postcopy.session.states import Owner, State
from postcopy.wire.messages import SINCE, Cancel, Hello, Message, Probe, Probed, Refuse, Welcome

_SINCE = SINCE["probe"]


class Step(StrEnum):
    """What the asking side waits for."""

    IDLE = "idle"
    DIALLING = "dialling"  # for the control connection
    GREETING = "greeting"  # for Welcome
    ASKING = "asking"  # for Probed
    COMPLETED = "completed"
    FAILED = "failed"


class ProbeMachine(Machine[Step]):
    """One question; `answer` is there once it is completed."""

    states: ClassVar = {
        Step.IDLE: State.NONE,
        Step.DIALLING: State.SETUP,
        Step.GREETING: State.SETUP,
        Step.ASKING: State.SETUP,
        Step.COMPLETED: State.COMPLETED,
        Step.FAILED: State.FAILED,
    }
    patience: ClassVar = {
        Step.DIALLING: DIAL_SECONDS,
        Step.GREETING: ANSWER_SECONDS,
        Step.ASKING: PREPARE_SECONDS,
    }

    def __init__(self, hello: Hello, probe: Probe) -> None:
        super().__init__(Step.IDLE)
        self.hello = hello
        self.probe = probe
        self.answer: Probed | None = None

    def key(self, event: Event) -> str:
        """Tell a destination that cannot be asked, since its version knows no probe."""
        match event:
            case Received(message=Welcome(version=version)) if not _SINCE <= version <= self.hello.versions[1]:
                return "WelcomeUnspoken"
            case _:
                return super().key(event)

    def give_up(self, failure: WorkFailed) -> list[Command]:
        """Leave without an answer."""
        commands, self.step, self.deadline = _fail(self, failure), Step.FAILED, None
        return commands


def _connect(_machine: ProbeMachine, _event: Started) -> list[Command]:
    return [Connect()]


def _greet(machine: ProbeMachine, _event: Event) -> list[Command]:
    return [Send(machine.hello)]


def _ask(machine: ProbeMachine, welcome: Welcome) -> list[Command]:
    machine.version = welcome.version
    return [Send(machine.probe)]


def _take(machine: ProbeMachine, answer: Probed) -> list[Command]:
    machine.answer = answer
    return [CloseLinks(), Finish(State.COMPLETED, Owner.SOURCE, f"the destination answered: {answer.answer}", 0)]


def _unspoken(_machine: ProbeMachine, welcome: Welcome) -> list[Command]:
    text = f"the destination speaks version {welcome.version} of the protocol, a probe needs version {_SINCE}"
    return [Send(Cancel(text)), CloseLinks(), Finish(State.FAILED, Owner.SOURCE, text, 4)]


def _fail(machine: ProbeMachine, subject: Event | Message) -> list[Command]:
    goodbye: list[Command] = []
    status = int(getattr(subject, "exit_status", 4))
    match subject:
        case Refuse(text=text):
            text = f"the destination refused: {text}"
        case Cancel(text=text):
            text = f"cancelled by the destination: {text}"
        case Broken(text=text):
            text = f"the destination broke the protocol: {text}"
            goodbye = [Send(Refuse("protocol", text))]
        case _:
            text = getattr(subject, "text", f"the destination did not answer in time ({machine.step})")
    return [*goodbye, CloseLinks(), Finish(State.FAILED, Owner.SOURCE, text, status)]


_WAITING = (Step.DIALLING, Step.GREETING, Step.ASKING)
_FAILURES = ("ControlLost", "NotSent", "Broken", "WorkFailed", "Refuse", "Cancel", "Elapsed")

ProbeMachine.table = {
    (Step.IDLE, "Started"): (Step.DIALLING, _connect),
    (Step.DIALLING, "Connected"): (Step.GREETING, _greet),
    (Step.GREETING, "Welcome"): (Step.ASKING, _ask),
    (Step.GREETING, "WelcomeUnspoken"): (Step.FAILED, _unspoken),
    (Step.ASKING, "Probed"): (Step.COMPLETED, _take),
    **{(step, key): (Step.FAILED, _fail) for step in _WAITING for key in _FAILURES},
}
