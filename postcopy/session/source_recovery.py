"""The source after Run: what becomes of a migration whose connections end, and the rows of the table for it.

The guest runs at the destination and pages of it are here, so they are kept whatever happens, and the source dials
again until the destination answers, somebody gives up, or it hears that either side's part is gone for good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from postcopy.errors import ProtocolError
from postcopy.session.commands import (
    CloseLinks,
    Command,
    Connect,
    DialData,
    DropControl,
    Finish,
    KeepRecord,
    Note,
    NoteResidence,
    Send,
    StartPump,
    StopPump,
    WatchData,
)
from postcopy.session.events import Elapsed, Event, LoseAsked, PauseAsked, PumpFailed, WorkFailed
from postcopy.session.source_steps import PAUSES, Step
from postcopy.session.states import Owner, State
from postcopy.wire.messages import GONE, Alive, Have, Message, Refuse, Resume, Welcome

if TYPE_CHECKING:
    from postcopy.session.source import SourceMachine


def take_up(machine: SourceMachine, now: float, version: int, migration_id: bytes, token: bytes, *, held: bool) -> None:
    """Make a fresh machine that of a migration whose Run was sent, in the place of an agent that is gone.

    `held`: somebody had paused it, so it waits for somebody to have it go on.
    """
    machine.step = Step.PAUSED
    machine.version, machine.migration_id = version, migration_id
    machine.token = machine.first_token = token
    machine.now = machine.paused_at = machine.heard_at = now
    machine.held = held
    machine.deadline = machine.give_up_at if held else now
    machine.trouble = "the source's agent was killed"


def say_alive(machine: SourceMachine, _event: Event) -> list[Command]:
    """Tell the destination that somebody is here."""
    return [Send(Alive())] if machine.recoverable else []


def pause(machine: SourceMachine, subject: Event | Message) -> list[Command]:
    """Close what is left of the connections, keep every page, and try again after a while."""
    text = machine.why(subject)
    if machine.step is Step.ACTIVE:
        machine.paused_at = machine.now
        machine.push, machine.pushing = machine.push or machine.pushing, False
    machine.held = isinstance(subject, PauseAsked)
    machine.trouble = text
    goes_on = "until it is asked to resume" if machine.held else "trying to reconnect"
    kept = [KeepRecord()] if machine.held else []
    return [*kept, StopPump(), DropControl(), Note(f"paused: {text}; {goes_on}")]


def try_later(machine: SourceMachine, subject: Event | Message) -> list[Command]:
    """Take an attempt to reconnect for failed; the next one follows."""
    return [StopPump(), DropControl(), *machine.failed(machine.why(subject))]


def hold(machine: SourceMachine, _event: Event) -> list[Command]:
    """Try no more until somebody asks for it."""
    machine.held = True
    return [KeepRecord(), StopPump(), DropControl(), Note("paused until it is asked to resume")]


def redial(_machine: SourceMachine, _event: Event) -> list[Command]:
    """Try to reconnect."""
    return [Connect()]


def redial_now(machine: SourceMachine, _event: Event) -> list[Command]:
    """Try to reconnect at once, whatever attempt is under way, and go on trying."""
    kept = [KeepRecord()] if machine.held else []
    machine.held = False
    machine.attempts = 0
    return [*kept, StopPump(), DropControl(), Connect()]


def rejoin(machine: SourceMachine, _event: Event) -> list[Command]:
    """Say which migration this is, and prove it."""
    return [Send(Resume(machine.migration_id, machine.first_token))]


def take_welcome(machine: SourceMachine, welcome: Welcome) -> list[Command]:
    """Take the token of this attempt."""
    if (welcome.version, welcome.migration_id) != (machine.version, machine.migration_id):
        raise ProtocolError("the destination answered for another migration")
    machine.token = welcome.token
    return []


def take_residence(_machine: SourceMachine, have: Have) -> list[Command]:
    """Take note of pages that the destination has."""
    return [NoteResidence(have)]


def reattach(machine: SourceMachine, _event: Message) -> list[Command]:
    """Dial the data connections again."""
    return [DialData(machine.migration_id, machine.token)]


def go_on(machine: SourceMachine, _event: Event) -> list[Command]:
    """Send pages again."""
    machine.told = False
    machine.reconnects += 1
    machine.attempts += 1  # until there is Progress: what is cut each time at once has led to nothing
    paused = machine.now - machine.paused_at
    return [StartPump(), WatchData(), *machine.begin_push(), Note(f"resumed after a pause of {paused:.1f} s")]


def lose(machine: SourceMachine, subject: Event | Message) -> list[Command]:
    """Give up what can no more be brought to the guest, and say so where somebody listens."""
    why = machine.why(subject)
    if isinstance(subject, Elapsed) and machine.step is not Step.ACTIVE:
        why = f"it could not be resumed in time ({machine.trouble})"
    text = f"lost after the switchover: {why}; the destination may be running the guest, so it stays stopped here"
    ours = (
        isinstance(subject, LoseAsked | Elapsed | PumpFailed)
        and machine.recoverable
        and machine.step is not Step.REDIALLING
    )
    goodbye = [Send(Refuse(GONE, why))] if ours and machine.step is not Step.PAUSED else []
    return [*goodbye, StopPump(), CloseLinks(), Finish(State.LOST, Owner.LOST, text, 6)]


def too_late(_machine: SourceMachine, _event: Event) -> list[Command]:
    """Refuse to cancel."""
    return [Note("not cancelled: the guest runs at the destination")]


def wish_push(machine: SourceMachine, _event: Event) -> list[Command]:
    """Push as soon as pages can travel."""
    machine.push = True
    return []


def note_push_failed(machine: SourceMachine, event: WorkFailed) -> list[Command]:
    """Serve faults as before: a push that stopped is no reason to give up a guest, and may be asked for again."""
    machine.pushing = False
    return [Note(f"the push stopped: {event.text}")]


def stay(_machine: SourceMachine, _event: Event) -> list[Command]:
    """Do nothing."""
    return []


# What ends a connection, and so an attempt.
_TROUBLES = ("ControlLost", "Broken", "PumpBroken", "Refuse", "Elapsed")
# What may still be heard of connections that are closed, and of work that was called back.
_LATE = ("ControlLost", "Broken", "PumpBroken", "NotSent", "WorkFailed", "Connected", "DataConnected")

ROWS = {
    (Step.ACTIVE, "AliveDue"): (Step.ACTIVE, say_alive),
    **{(Step.ACTIVE, key): (Step.PAUSED, pause) for key in (*_TROUBLES, "PauseAsked")},
    **{(Step.ACTIVE, key): (Step.LOST, lose) for key in ("Severed", "PumpFailed", "RefuseGone", "LoseAsked")},
    (Step.ACTIVE, "NotSent"): (Step.ACTIVE, stay),  # ControlLost follows it
    (Step.ACTIVE, "WorkFailed"): (Step.ACTIVE, note_push_failed),
    (Step.ACTIVE, "CancelAsked"): (Step.ACTIVE, too_late),
    (Step.ACTIVE, "Cancel"): (Step.ACTIVE, stay),  # it crossed Run on the way
    (Step.ACTIVE, "ResumeAsked"): (Step.ACTIVE, stay),  # it had come back meanwhile
    # between two attempts
    (Step.PAUSED, "Elapsed"): (Step.REDIALLING, redial),
    **{(Step.PAUSED, key): (Step.PAUSED, stay) for key in _LATE},
    # on the way back
    (Step.REDIALLING, "Connected"): (Step.REJOINING, rejoin),
    **{
        (Step.REDIALLING, key): (Step.REDIALLING, stay)
        for key in ("ControlLost", "Broken", "PumpBroken", "NotSent", "DataConnected")
    },
    **{(Step.REDIALLING, key): (Step.PAUSED, try_later) for key in ("WorkFailed", "Elapsed")},
    (Step.REJOINING, "Welcome"): (Step.REJOINING, take_welcome),
    (Step.REJOINING, "Have"): (Step.REJOINING, take_residence),
    (Step.REJOINING, "Ready"): (Step.REATTACHING, reattach),
    (Step.REATTACHING, "DataConnected"): (Step.ACTIVE, go_on),
    **{
        (step, key): (Step.PAUSED, try_later)
        for step in (Step.REJOINING, Step.REATTACHING)
        # a Cancel is that of a destination that gave up before Run as the source came back: the next attempt is told so
        for key in (*_TROUBLES, "Cancel", "NotSent", "WorkFailed", "PumpFailed")
    },
    **{(step, "RefuseGone"): (Step.LOST, lose) for step in (Step.REJOINING, Step.REATTACHING)},
    # anywhere on that way
    **{(step, "AliveDue"): (step, stay) for step in PAUSES},
    **{(step, "PushAsked"): (step, wish_push) for step in PAUSES},
    **{(step, "CancelAsked"): (step, too_late) for step in PAUSES},
    **{(step, "PauseAsked"): (Step.PAUSED, hold) for step in PAUSES},
    **{(step, "ResumeAsked"): (Step.REDIALLING, redial_now) for step in PAUSES},
    **{(step, key): (Step.LOST, lose) for step in PAUSES for key in ("LoseAsked", "GiveUpElapsed")},
}
