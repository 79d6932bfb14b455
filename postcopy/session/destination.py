"""The destination's side of a migration: owns the guest from the receipt of Run, and never before.

In come the source's messages, data connections that proved themselves and what this host's own work led to; out go
commands. Until Run is here everything can be thrown away, with one exception: after Loaded was sent, Run may already be
on its way, so then nobody's change of mind and no clock makes the destination walk off; it asks the source to cancel
and goes on listening until either Run or the end of the connection arrives. It leaves by itself only where it could not
run the guest any more: its pump or its own work has failed, or the source broke the protocol. After Run pages that are
still at the source are part of the guest: when they become unreachable the guest is lost, its threads are kept waiting,
and no zeros are given out. With the last page placed nothing the source does can harm the guest any more.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from postcopy.session.commands import (
    CloseLinks,
    Command,
    Discard,
    Finish,
    HoldMemory,
    Load,
    MakeReport,
    Note,
    Prepare,
    Send,
    Settle,
    StartGuest,
    StartPump,
    StopPump,
    TryOut,
)
from postcopy.session.events import (
    AllResident,
    Broken,
    CancelAsked,
    ControlLost,
    DataAttached,
    Elapsed,
    Event,
    GuestRunning,
    NotSent,
    Progressed,
    PumpFailed,
    Received,
    Resident,
    TriedOut,
    WorkFailed,
)
from postcopy.session.limits import (
    ANSWER_SECONDS,
    DIAL_SECONDS,
    LOAD_SECONDS,
    OFFER_SECONDS,
    PROGRESS_SECONDS,
    RELEASE_SECONDS,
    SILENCE_SECONDS,
    STOP_SECONDS,
)
from postcopy.session.machine import Machine
from postcopy.session.states import Owner, State
from postcopy.wire.messages import (
    AllPlaced,
    Cancel,
    Hello,
    LayoutOffer,
    Loaded,
    Message,
    Probe,
    Progress,
    Ready,
    Refuse,
    Run,
    Running,
    Welcome,
)
from postcopy.wire.messages import State as StateMessage

ROLES = frozenset({"urgent", "push"})


class Step(StrEnum):
    """What the destination waits for."""

    IDLE = "idle"  # for Hello
    GREETED = "greeted"  # for LayoutOffer
    PROBING = "probing"  # for its own work
    PREPARING = "preparing"  # for its own work
    WAITING = "waiting"  # for the data connections
    ATTACHED = "attached"  # for State
    LOADING = "loading"  # for its own work
    LOADED = "loaded"  # for Run
    ACTIVE = "active"  # for the last page
    SETTLING = "settling"  # for its own report; needs nothing more from the source
    RELEASING = "releasing"  # for Released; as before
    PROBED = "probed"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


class DestinationMachine(Machine[Step]):
    """One migration as its destination sees it.

    `identity` is (migration id, token), fresh random bytes for every migration; `versions` are the lowest
    and the highest spoken.
    """

    states: ClassVar = {
        Step.IDLE: State.NONE,
        Step.GREETED: State.SETUP,
        Step.PROBING: State.SETUP,
        Step.PREPARING: State.SETUP,
        Step.WAITING: State.SETUP,
        Step.ATTACHED: State.SETUP,
        Step.LOADING: State.DEVICE,
        Step.LOADED: State.DEVICE,
        Step.ACTIVE: State.POSTCOPY_ACTIVE,
        Step.SETTLING: State.COMPLETED,
        Step.RELEASING: State.COMPLETED,
        Step.PROBED: State.CANCELLED,
        Step.COMPLETED: State.COMPLETED,
        Step.FAILED: State.FAILED,
        Step.CANCELLED: State.CANCELLED,
        Step.LOST: State.LOST,
    }
    patience: ClassVar = {
        Step.IDLE: ANSWER_SECONDS,
        Step.GREETED: OFFER_SECONDS,
        Step.WAITING: DIAL_SECONDS + ANSWER_SECONDS,
        Step.ATTACHED: STOP_SECONDS + ANSWER_SECONDS,
        Step.LOADED: LOAD_SECONDS + ANSWER_SECONDS,
        Step.RELEASING: RELEASE_SECONDS,
    }
    lingering: ClassVar = frozenset({Step.SETTLING, Step.RELEASING})

    def __init__(
        self, versions: tuple[int, int], identity: tuple[bytes, bytes], software: str, boot_id: str, now: float
    ) -> None:
        super().__init__(Step.IDLE)
        self.deadline = now + ANSWER_SECONDS
        self.versions = versions
        self.migration_id, self.token = identity
        self.software = software
        self.boot_id = boot_id
        self.attached: set[str] = set()
        self.comparable = False
        self.probed = False  # it was only ever a question: no migration began
        self.resident = False  # every page was placed before Run had been read
        self._fed_bytes = -1
        self._unfed = 0  # looks in a row

    def key(self, event: Event) -> str:
        """Tell a Hello in no common version, the last data connection, and a source that stopped answering."""
        match event:
            case Received(message=Hello(versions=(low, high))) if not self._common(low, high):
                return "HelloUnspoken"
            case DataAttached(role=role) if self.attached | {role} == ROLES:
                return "LastDataAttached"
            case Progressed() if self._starved(event):
                return "Starved"
            case Received(message=Run()) if self.resident:
                return "RunResident"
            case _:
                return super().key(event)

    def _common(self, low: int, high: int) -> int:
        """Return the highest version both speak, 0 if there is none."""
        best = min(high, self.versions[1])
        return best if best >= max(low, self.versions[0]) else 0

    def _starved(self, event: Progressed) -> bool:
        """Whether it owes pages and sent no byte for too many looks (not seconds: this side may have been stopped)."""
        fed = event.owed == 0 or event.received_bytes != self._fed_bytes
        self._fed_bytes, self._unfed = event.received_bytes, 0 if fed else self._unfed + 1
        return self._unfed * PROGRESS_SECONDS > SILENCE_SECONDS

    def give_up(self, failure: WorkFailed) -> list[Command]:
        """Before Run the guest is the source's; after it the pages decide whether it is whole."""
        if self.step in {Step.SETTLING, Step.RELEASING}:
            commands, self.step = _complete(self, failure), Step.COMPLETED
        elif self.step is Step.ACTIVE:
            commands, self.step = _lose(self, failure), Step.LOST
        else:
            commands, self.step = _fail(self, failure), Step.FAILED
        self.deadline = None
        return commands


# --- the way forward, in the order in which it is gone ----------------------------------------------------


def _welcome(machine: DestinationMachine, message: Hello) -> list[Command]:
    machine.version = machine._common(*message.versions)  # noqa: SLF001 - the machine's own action
    return [Send(Welcome(machine.version, machine.migration_id, machine.token, machine.software))]


def _refuse_version(machine: DestinationMachine, message: Hello) -> list[Command]:
    low, high = machine.versions
    spoken = "version {} to {}".format(*message.versions)
    text = f"the source speaks {spoken}, this destination version {low} to {high}"
    return [Send(Refuse("version", text)), CloseLinks(), Finish(State.FAILED, Owner.SOURCE, text, 4)]


def _prepare(_machine: DestinationMachine, offer: LayoutOffer) -> list[Command]:
    return [Prepare(offer)]


def _try_out(machine: DestinationMachine, probe: Probe) -> list[Command]:
    machine.probed = True
    return [TryOut(probe.offer)]


def _answer(_machine: DestinationMachine, event: TriedOut) -> list[Command]:
    text = f"answered a probe: {event.answer.answer}"
    return [Send(event.answer), CloseLinks(), Finish(State.CANCELLED, Owner.SOURCE, text, 0)]


def _ready(_machine: DestinationMachine, _event: Event) -> list[Command]:
    return [Send(Ready())]


def _attach(machine: DestinationMachine, event: DataAttached) -> list[Command]:
    machine.attached.add(event.role)
    return []


def _attach_last(machine: DestinationMachine, event: DataAttached) -> list[Command]:
    machine.attached.add(event.role)
    return [StartPump()]


def _load(machine: DestinationMachine, state: StateMessage) -> list[Command]:
    machine.comparable = state.boot_id == machine.boot_id
    return [Load(state.guest, state.stopped_at, state.boot_id)]


def _loaded(_machine: DestinationMachine, _event: Event) -> list[Command]:
    return [Send(Loaded())]


def _start_guest(_machine: DestinationMachine, _event: Event) -> list[Command]:
    return [StartGuest()]


def _running(machine: DestinationMachine, event: GuestRunning) -> list[Command]:
    return [Send(Running(event.first_instruction_at if machine.comparable else 0.0))]


def _progress(_machine: DestinationMachine, event: Progressed) -> list[Command]:
    return [Send(Progress(event.placed_pages, event.total_pages, event.faults))]


def _resident_early(machine: DestinationMachine, _event: Event) -> list[Command]:
    # Run and memory travel on connections of their own: a small guest may be here before Run is.
    machine.resident = True
    return []


def _start_resident(_machine: DestinationMachine, _event: Event) -> list[Command]:
    return [StartGuest(), MakeReport()]


def _sum_up(_machine: DestinationMachine, _event: Event) -> list[Command]:
    return [MakeReport()]


def _all_placed(_machine: DestinationMachine, event: AllResident | WorkFailed) -> list[Command]:
    # The data connections stay open until Released: closed earlier, the source would take their end for a loss. It
    # would do so for want of this message, too, so a report that cannot be made does not hold it back.
    report = event.report if isinstance(event, AllResident) else {}
    return [Settle(), Send(AllPlaced(report))]


def _complete(machine: DestinationMachine, _event: Event) -> list[Command]:
    text = "every page is here, the guest runs on without the source"
    settle: list[Command] = [Settle()] if machine.step is Step.SETTLING else []
    return [*settle, StopPump(), CloseLinks(), Finish(State.COMPLETED, Owner.DESTINATION, text, 0)]


def _stay(_machine: DestinationMachine, _event: Event) -> list[Command]:
    return []


# --- the ways out before Run: everything is thrown away ---------------------------------------------------


def _away(subject: Event | Message, state: State) -> list[Command]:
    """Tell the source if it is still there and does not know yet, forget the guest."""
    goodbye: list[Command] = []
    status = 7 if state is State.CANCELLED else 4
    match subject:
        case Cancel(text=text):
            text = f"cancelled by the source: {text}"
        case Refuse(text=text):
            text = f"the source refused: {text}"
        case ControlLost(text=text) | NotSent(text=text):
            pass
        case WorkFailed(code=code, text=text, exit_status=status):
            goodbye = [Send(Refuse(code, text))]
        case Broken(text=text):
            text = f"the source broke the protocol: {text}"
            goodbye = [Send(Refuse("protocol", text))]
        case CancelAsked(text=text) | PumpFailed(text=text):
            goodbye = [Send(Cancel(text))]
        case Resident():
            text = "every page came before the guest's state"
            goodbye = [Send(Cancel(text))]
        case _:
            text = "the source did not go on in time"
            goodbye = [Send(Cancel(text))]
    return [*goodbye, Discard(), CloseLinks(), Finish(state, Owner.SOURCE, text, status)]


def _fail(_machine: DestinationMachine, subject: Event | Message) -> list[Command]:
    return _away(subject, State.FAILED)


def _cancel(_machine: DestinationMachine, subject: Event | Message) -> list[Command]:
    return _away(subject, State.CANCELLED)


def _ask_to_cancel(machine: DestinationMachine, event: Event) -> list[Command]:
    if isinstance(event, Elapsed):
        machine.deadline = None  # asked once; from here the connection itself tells
    text = event.text if isinstance(event, CancelAsked) else "Run did not come in time"
    return [Send(Cancel(text))]


# --- after Run --------------------------------------------------------------------------------------------


def _lose(_machine: DestinationMachine, subject: Event | Message) -> list[Command]:
    if isinstance(subject, Progressed):
        why = f"the source owes {subject.owed} pages and sent nothing for {SILENCE_SECONDS:g} s"
    else:
        why = str(getattr(subject, "text", type(subject).__name__))
    text = f"lost after the switchover: {why}; pages that were still at the source are gone"
    return [HoldMemory(), CloseLinks(), Finish(State.LOST, Owner.LOST, text, 6)]


def _mine(_machine: DestinationMachine, _event: Event) -> list[Command]:
    return [Note("not cancelled: the guest runs here")]


_EARLY = (Step.GREETED, Step.PROBING, Step.PREPARING, Step.WAITING, Step.ATTACHED, Step.LOADING)
_FAILURES = ("ControlLost", "NotSent", "Broken", "WorkFailed", "PumpFailed", "Refuse", "Elapsed")
_GOODBYES = ("ControlLost", "Broken", "Refuse", "Elapsed")
_LATE = ("NotSent", "PumpFailed", "Starved", "Resident")
_CANCELS = ("Cancel", "CancelAsked")

DestinationMachine.table = {
    (Step.IDLE, "Hello"): (Step.GREETED, _welcome),
    (Step.IDLE, "HelloUnspoken"): (Step.FAILED, _refuse_version),
    (Step.GREETED, "LayoutOffer"): (Step.PREPARING, _prepare),
    (Step.GREETED, "Probe"): (Step.PROBING, _try_out),
    (Step.PROBING, "TriedOut"): (Step.PROBED, _answer),
    (Step.PREPARING, "Prepared"): (Step.WAITING, _ready),
    (Step.WAITING, "DataAttached"): (Step.WAITING, _attach),
    (Step.WAITING, "LastDataAttached"): (Step.ATTACHED, _attach_last),
    (Step.ATTACHED, "State"): (Step.LOADING, _load),
    (Step.LOADING, "GuestLoaded"): (Step.LOADED, _loaded),
    (Step.LOADED, "Run"): (Step.ACTIVE, _start_guest),
    (Step.ACTIVE, "GuestRunning"): (Step.ACTIVE, _running),
    (Step.ACTIVE, "Progressed"): (Step.ACTIVE, _progress),
    (Step.ACTIVE, "Resident"): (Step.SETTLING, _sum_up),
    (Step.SETTLING, "GuestRunning"): (Step.SETTLING, _running),
    (Step.SETTLING, "Progressed"): (Step.SETTLING, _progress),
    (Step.SETTLING, "AllResident"): (Step.RELEASING, _all_placed),
    (Step.SETTLING, "WorkFailed"): (Step.RELEASING, _all_placed),
    (Step.RELEASING, "GuestRunning"): (Step.RELEASING, _running),
    (Step.RELEASING, "Released"): (Step.COMPLETED, _complete),
    **{(step, key): (Step.FAILED, _fail) for step in (Step.IDLE, *_EARLY) for key in _FAILURES},
    **{(step, key): (Step.CANCELLED, _cancel) for step in (Step.IDLE, *_EARLY) for key in _CANCELS},
    **{(step, "Resident"): (Step.FAILED, _fail) for step in (Step.ATTACHED, Step.LOADING)},
    # from here Run may be on its way
    (Step.LOADED, "Resident"): (Step.LOADED, _resident_early),
    (Step.LOADED, "RunResident"): (Step.SETTLING, _start_resident),
    **{(Step.LOADED, key): (Step.LOADED, _ask_to_cancel) for key in ("CancelAsked", "Elapsed")},
    **{(Step.LOADED, key): (Step.FAILED, _fail) for key in _FAILURES if key != "Elapsed"},
    (Step.LOADED, "Cancel"): (Step.CANCELLED, _cancel),
    # the guest runs here
    **{
        (Step.ACTIVE, key): (Step.LOST, _lose)
        for key in ("ControlLost", "Broken", "PumpFailed", "WorkFailed", "Refuse", "Starved")
    },
    (Step.ACTIVE, "NotSent"): (Step.ACTIVE, _stay),  # ControlLost follows it
    (Step.ACTIVE, "CancelAsked"): (Step.ACTIVE, _mine),
    # every page is here: whatever the source does now, the guest does not need it
    **{(Step.SETTLING, key): (Step.COMPLETED, _complete) for key in _GOODBYES},
    **{(Step.RELEASING, key): (Step.COMPLETED, _complete) for key in _GOODBYES},
    **{(step, key): (step, _stay) for step in (Step.SETTLING, Step.RELEASING) for key in _LATE},
    **{(Step.RELEASING, key): (Step.RELEASING, _stay) for key in ("WorkFailed", "Progressed", "AllResident")},
    **{(step, "CancelAsked"): (step, _mine) for step in (Step.SETTLING, Step.RELEASING)},
}
