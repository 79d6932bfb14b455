"""The destination after Run, while pages are missing: what becomes of it when connections end, and the rows for it.

The guest runs here and waits where it misses a page. Nothing that happens to connections changes that: the source comes
back with Resume, is told what is here, and pages travel again. Lost are they only where somebody gives them up, the
source says that it has them no more, or this host's kernel refuses to place them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from postcopy.session.commands import (
    CloseLinks,
    Command,
    DetachData,
    DropControl,
    Finish,
    HoldMemory,
    KeepRecord,
    MakeReport,
    Note,
    Poison,
    ResumePump,
    Send,
    StartGuest,
    TellResidence,
    WatchData,
)
from postcopy.session.destination_steps import PAUSES, Step
from postcopy.session.events import (
    DataAttached,
    Elapsed,
    Event,
    GuestRunning,
    LoseAsked,
    PauseAsked,
    Progressed,
    PumpFailed,
    Rejoined,
    WorkFailed,
)
from postcopy.session.states import Owner, State
from postcopy.wire.messages import GONE, HELD, Message, Ready, Refuse, Running, Welcome

if TYPE_CHECKING:
    from postcopy.session.destination import DestinationMachine


def take_up(machine: DestinationMachine, now: float, version: int, token: bytes, *, held: bool) -> None:
    """Make a fresh machine that of a migration whose Run had come, in the place of an agent that is gone.

    `held`: somebody had paused it, so it waits for somebody to have it go on.
    """
    machine.step = Step.PAUSED
    machine.version = version
    machine.token = machine.first_token = token
    machine.now = machine.paused_at = machine.heard_at = now
    machine.held = held
    machine.deadline = machine.give_up_at
    machine.trouble = "the destination's agent was killed"


def why(machine: DestinationMachine, subject: Event | Message) -> str:
    """Say what happened, for a person."""
    match subject:
        case Progressed(owed=owed):
            return f"the source owes {owed} pages and sends none"
        case Elapsed() if machine.step is Step.ACTIVE:
            return "nothing was heard from the source any more"
        case Elapsed():
            return f"it was not resumed in time ({machine.trouble})"
        case Refuse(text=text):
            return f"the source says: {text}"
        case _:
            return str(getattr(subject, "text", type(subject).__name__))


def pause(machine: DestinationMachine, subject: Event | Message) -> list[Command]:
    """Close what is left of the connections; the guest goes on with what is here."""
    machine.trouble = why(machine, subject)
    machine.held = machine.held or isinstance(subject, PauseAsked)
    if machine.step is Step.ACTIVE:
        machine.paused_at = machine.now
    waits = "until it is asked to resume" if machine.held else "until the source comes back"
    kept = [KeepRecord()] if machine.held else []
    return [*kept, DetachData(), DropControl(), Note(f"paused {waits}: {machine.trouble}")]


def hold(machine: DestinationMachine, _event: Event) -> list[Command]:
    """Let the source come back only when somebody asks for it."""
    machine.held = True
    return [KeepRecord(), Note("paused until it is asked to resume")]


def release(machine: DestinationMachine, _event: Event) -> list[Command]:
    """Let the source come back."""
    machine.held = False
    return [KeepRecord(), Note("paused until the source comes back")]


def refuse_return(_machine: DestinationMachine, _event: Event) -> list[Command]:
    """Send the source away: somebody holds the migration here."""
    return [
        Send(Refuse(HELD, "the migration is held at the destination until it is asked to resume")),
        DropControl(),
    ]


def welcome_back(machine: DestinationMachine, event: Rejoined) -> list[Command]:
    """Tell the source what is here, with no connection of before left."""
    if machine.step is Step.ACTIVE:
        machine.paused_at = machine.now
    machine.attached.clear()
    machine.token = event.token
    welcome = Welcome(machine.version, machine.migration_id, event.token, machine.software)
    return [DetachData(), Send(welcome), TellResidence(), Send(Ready())]


def start_and_welcome(machine: DestinationMachine, event: Rejoined) -> list[Command]:
    """Run the guest: who comes back has sent Run, and it was lost on the way."""
    machine.paused_at = machine.now
    return [StartGuest(), WatchData(), *welcome_back(machine, event)]


def start_whole_and_welcome(machine: DestinationMachine, event: Rejoined) -> list[Command]:
    """Do the same where every page is here."""
    return [StartGuest(), MakeReport(), *welcome_whole(machine, event)]


def welcome_whole(machine: DestinationMachine, event: Rejoined) -> list[Command]:
    """Tell a source that came back that its pages are needed no more, as soon as there is a report."""
    welcome = Send(Welcome(machine.version, machine.migration_id, event.token, machine.software))
    return [welcome] if machine.all_placed is None else [welcome, Send(machine.all_placed)]


def attach(machine: DestinationMachine, event: DataAttached) -> list[Command]:
    """Take note of the first data connection."""
    machine.attached.add(event.role)
    return []


def go_on(machine: DestinationMachine, event: DataAttached) -> list[Command]:
    """Let pages travel again: the last data connection is there."""
    machine.attached.add(event.role)
    return resume(machine)


def resume(machine: DestinationMachine) -> list[Command]:
    """Let pages travel again, and say again what may have been lost."""
    machine.reconnects += 1
    paused = machine.now - machine.paused_at
    told = [] if machine.first_instruction_at is None else [Send(Running(machine.first_instruction_at))]
    return [ResumePump(), *told, Note(f"resumed after a pause of {paused:.1f} s")]


def note_running(machine: DestinationMachine, event: GuestRunning) -> list[Command]:
    """Keep in mind when the guest made its first step, to tell it later."""
    machine.first_instruction_at = event.first_instruction_at if machine.comparable else 0.0
    return []


def lose(machine: DestinationMachine, subject: Event | Message) -> list[Command]:
    """Give up what is still at the source: whoever touches it is told, and never sees zeros."""
    reason = why(machine, subject)
    text = f"lost after the switchover: {reason}; pages that were still at the source are gone"
    # A pump that failed cannot do it any more: then who waits for a page goes on waiting.
    given_up = [] if isinstance(subject, PumpFailed | WorkFailed) else [DetachData(), Poison()]
    ours = isinstance(subject, LoseAsked | Elapsed | PumpFailed | WorkFailed) and machine.recoverable
    goodbye = [Send(Refuse(GONE, reason))] if ours and machine.step is not Step.PAUSED else []
    return [HoldMemory(), *goodbye, *given_up, CloseLinks(), Finish(State.LOST, Owner.LOST, text, 6)]


def mine(_machine: DestinationMachine, _event: Event) -> list[Command]:
    """Refuse to cancel."""
    return [Note("not cancelled: the guest runs here")]


def stay(_machine: DestinationMachine, _event: Event) -> list[Command]:
    """Do nothing."""
    return []


_TROUBLES = ("ControlLost", "Broken", "PumpBroken", "Refuse", "Elapsed", "Starved")
# What may still be heard of connections that are closed.
_LATE = ("ControlLost", "Broken", "PumpBroken", "NotSent", "Progressed", "Starved", "Alive", "Cancel")
# A data connection that was let in as its attempt ended: it was closed with the others.
_LATE_DATA = ("DataAttached", "LastDataAttached", "DataAttachedBefore")

ROWS = {
    (Step.ACTIVE, "Alive"): (Step.ACTIVE, stay),
    (Step.ACTIVE, "Rejoined"): (Step.RECOVERING, welcome_back),
    **{(Step.ACTIVE, key): (Step.PAUSED, pause) for key in (*_TROUBLES, "PauseAsked")},
    **{
        (Step.ACTIVE, key): (Step.LOST, lose)
        for key in ("Severed", "RefuseGone", "PumpFailed", "WorkFailed", "LoseAsked")
    },
    (Step.ACTIVE, "NotSent"): (Step.ACTIVE, stay),  # ControlLost follows it
    (Step.ACTIVE, "CancelAsked"): (Step.ACTIVE, mine),
    (Step.ACTIVE, "ResumeAsked"): (Step.ACTIVE, stay),  # the source had come back meanwhile
    # between two attempts of the source
    (Step.PAUSED, "Rejoined"): (Step.RECOVERING, welcome_back),
    (Step.PAUSED, "RejoinedHeld"): (Step.PAUSED, refuse_return),
    (Step.PAUSED, "PauseAsked"): (Step.PAUSED, hold),
    (Step.PAUSED, "ResumeAsked"): (Step.PAUSED, release),
    **{(Step.PAUSED, key): (Step.PAUSED, stay) for key in (*_LATE, *_LATE_DATA)},
    # the source is back
    (Step.RECOVERING, "DataAttached"): (Step.RECOVERING, attach),
    (Step.RECOVERING, "LastDataAttached"): (Step.ACTIVE, go_on),
    (Step.RECOVERING, "Rejoined"): (Step.RECOVERING, welcome_back),
    **{(Step.RECOVERING, key): (Step.PAUSED, pause) for key in ("ControlLost", "Broken", "PumpBroken", "Refuse")},
    **{(Step.RECOVERING, key): (Step.PAUSED, pause) for key in ("Elapsed", "PauseAsked")},
    **{
        (Step.RECOVERING, key): (Step.RECOVERING, stay)
        for key in ("NotSent", "Progressed", "Starved", "Alive", "Cancel", "ResumeAsked", "DataAttachedBefore")
    },
    (Step.RECOVERING, "RefuseGone"): (Step.LOST, lose),
    # either way
    **{(step, "GuestRunning"): (step, note_running) for step in PAUSES},
    **{(step, "Resident"): (Step.SETTLING, lambda *_: [MakeReport()]) for step in PAUSES},
    **{(step, "CancelAsked"): (step, mine) for step in PAUSES},
    **{(step, key): (Step.LOST, lose) for step in PAUSES for key in ("PumpFailed", "WorkFailed", "LoseAsked")},
    **{(step, "GiveUpElapsed"): (Step.LOST, lose) for step in PAUSES},
    # RUN was lost on the way, and is known by who comes back
    (Step.LOADED, "Rejoined"): (Step.RECOVERING, start_and_welcome),
    (Step.LOADED, "RejoinedResident"): (Step.SETTLING, start_whole_and_welcome),
    # every page is here
    **{(step, "Rejoined"): (step, welcome_whole) for step in (Step.SETTLING, Step.RELEASING)},
    **{
        (step, key): (step, stay)
        for step in (Step.SETTLING, Step.RELEASING)
        for key in ("Alive", "PumpBroken", "PauseAsked", "ResumeAsked", "LoseAsked", *_LATE_DATA)
    },
}
