"""A destination that dials for its memory: until Run one as any other; after it, it is the one that comes back.

Its source knows no guest and keeps nobody's place: it has a file, and whoever fetches from it once more says again what
he wants, and what of it he has. So the way back is that of a first time, HELLO to RUN, with the guest running all the
while, and it may lead to an agent that was started anew. What has to be the same is the memory: STATE names it.
"""

from __future__ import annotations

from typing import ClassVar

from postcopy.errors import ProtocolError
from postcopy.limits import MEMORY_NAME_BYTES, RECONNECT_SECONDS
from postcopy.session import destination_actions as actions
from postcopy.session import destination_recovery as recovery
from postcopy.session.commands import (
    Command,
    Connect,
    DetachData,
    DialData,
    DropControl,
    KeepRecord,
    MakeReport,
    Note,
    Send,
    TellResidence,
)
from postcopy.session.destination import DestinationMachine
from postcopy.session.destination_steps import RETURNS, Step
from postcopy.session.events import Connected, DataAttached, Elapsed, Event, Progressed, Received
from postcopy.wire.messages import Hello, LayoutOffer, Loaded, Message, Ready, Welcome
from postcopy.wire.messages import State as StateMessage
from postcopy.wire.unpack import unpack

# Of an attempt; in this order, for whoever dials may be attaching what he has at this very moment.
_NOTHING_LEFT = (DropControl(), DetachData())

# STATE of a source that names nothing: an empty map, in msgpack.
NAMELESS = b"\x80"


class FetchingMachine(DestinationMachine):
    """One migration whose destination dials. `memory` is what its source called the memory that it serves."""

    table: ClassVar = {}
    memory = NAMELESS

    @property
    def recoverable(self) -> bool:
        """Whether it outlives its connections: only where a source can be told from one of other memory."""
        return super().recoverable and self.memory != NAMELESS

    @property
    def wants_data(self) -> bool:
        """Say no: nobody but itself makes its connections."""
        return False

    def key(self, event: Event) -> str:
        """Tell a source that speaks another version, offers something else, or serves other memory than before."""
        match event:
            case Received(message=Hello(versions=(low, high))) if self.step is Step.REJOINING:
                return "Hello" if low <= self.version <= high else "HelloUnspoken"
            case Received(message=LayoutOffer() as offer) if self.step is Step.REJOINING:
                return "LayoutOffer" if self._asked_for(offer) else "LayoutOfferOther"
            case Received(message=StateMessage(guest=memory)) if self.step is Step.RELOADING:
                return "State" if memory == self.memory else "StateOther"
            case _:
                return super().key(event)

    def _asked_for(self, offer: LayoutOffer) -> bool:
        offered = [(region.page_size, region.size) for region in offer.regions]
        return not offer.handed_over and offered == [(piece.page_size, piece.size) for piece in self.pieces]

    def _deadline(self, now: float, entered: bool) -> float | None:
        deadline = super()._deadline(now, entered)
        if self.step is not Step.PAUSED:
            return deadline
        wait = RECONNECT_SECONDS[min(self.attempts, len(RECONNECT_SECONDS) - 1)]
        redial = None if self.held else now + wait if entered else self.deadline
        return min((at for at in (redial, self.give_up_at) if at is not None), default=None)


def take_up(machine: FetchingMachine, now: float, version: int, memory: bytes, *, held: bool) -> None:
    """Make a fresh machine that of a migration whose Run had come: see destination_recovery.take_up()."""
    recovery.take_up(machine, now, version, machine.token, held=held)
    machine.memory = memory
    machine.deadline = machine.give_up_at if held else now


def _is_name(said: bytes) -> bool:
    match unpack(said, "state"):
        case {"memory": bytes(name), **rest} if not rest:
            return len(name) == MEMORY_NAME_BYTES
    return False


def _load(machine: FetchingMachine, state: StateMessage) -> list[Command]:
    if state.guest != NAMELESS and not _is_name(state.guest):
        raise ProtocolError("the source names its memory by nothing that is a name")
    machine.memory = state.guest
    return actions.load(machine, state)


# --- between two attempts, in the order in which the next one is gone ---------------------------------------


def _redial(_machine: FetchingMachine, _event: Event) -> list[Command]:
    return [Connect()]


def _redial_now(machine: FetchingMachine, _event: Event) -> list[Command]:
    """Try at once, whatever attempt is under way, and go on trying."""
    kept = [KeepRecord()] if machine.held else []
    machine.held, machine.attempts = False, 0
    return [*kept, *_NOTHING_LEFT, Connect()]


def _connected(machine: FetchingMachine, event: Connected) -> list[Command]:
    machine.attached.clear()
    machine.token = event.token
    return []


def _ask_again(machine: FetchingMachine, _hello: Hello) -> list[Command]:
    asked = (machine.pieces, machine.pages)
    return [Send(Welcome(machine.version, machine.migration_id, machine.token, machine.software, *asked))]


def _dial_data(machine: FetchingMachine, _offer: LayoutOffer) -> list[Command]:
    return [DialData(machine.migration_id, machine.token)]


def _tell_residence(machine: FetchingMachine, event: DataAttached) -> list[Command]:
    machine.attached.add(event.role)
    return [TellResidence(), Send(Ready())]


def _loaded(_machine: FetchingMachine, _state: StateMessage) -> list[Command]:
    return [Send(Loaded())]


def _go_on(machine: FetchingMachine, _run: Message) -> list[Command]:
    machine.told = False
    machine.attempts += 1  # until there is progress: what is cut each time at once has led to nothing
    return recovery.resume(machine)


def _progress(machine: FetchingMachine, event: Progressed) -> list[Command]:
    machine.attempts = 0  # it is back: a network that cuts every connection at once is asked no faster for it
    return actions.progress(machine, event)


def _try_later(machine: FetchingMachine, subject: Event | Message) -> list[Command]:
    """Take an attempt for failed; the next one follows."""
    match subject:
        case StateMessage():
            why = "the source there serves other memory than this was begun with"
        case LayoutOffer():
            why = "the source there offers other memory than it was asked for"
        case Hello(versions=(low, high)):
            why = f"the source there speaks version {low} to {high}, this migration is in version {machine.version}"
        case Elapsed():
            why = "the source did not answer in time"
        case _:
            why = recovery.why(machine, subject)
    return [*_NOTHING_LEFT, *machine.failed(why)]


def _hold(machine: FetchingMachine, _event: Event) -> list[Command]:
    """Try no more until somebody asks for it."""
    machine.held = True
    return [KeepRecord(), *_NOTHING_LEFT, Note("paused until it is asked to resume")]


def _whole(_machine: FetchingMachine, _event: Event) -> list[Command]:
    """Need no source any more: what was missing was given back. An attempt that is under way ends."""
    return [DropControl(), MakeReport()]


# What ends an attempt.
_FAILS = ("DialFailed", "ControlLost", "Broken", "PumpBroken", "Refuse", "Cancel", "NotSent", "Elapsed")
# What may still be heard of an attempt that is over, and of the pump, which nothing reaches.
_DATA = ("DataAttached", "LastDataAttached", "DataAttachedBefore")
_LATE = ("DialFailed", *_DATA)
_PUMP = ("Progressed", "Starved")

FetchingMachine.table = {
    **DestinationMachine.table,
    (Step.ATTACHED, "State"): (Step.LOADING, _load),
    (Step.ACTIVE, "Progressed"): (Step.ACTIVE, _progress),
    **{(Step.ACTIVE, key): (Step.ACTIVE, recovery.stay) for key in _LATE},
    (Step.PAUSED, "Elapsed"): (Step.REDIALLING, _redial),
    **{(Step.PAUSED, key): (Step.PAUSED, recovery.stay) for key in (*_LATE, "Refuse")},
    (Step.PAUSED, "PauseAsked"): (Step.PAUSED, _hold),
    (Step.REDIALLING, "Connected"): (Step.REJOINING, _connected),
    **{(Step.REDIALLING, key): (Step.PAUSED, _try_later) for key in ("DialFailed", "Elapsed")},
    **{
        (Step.REDIALLING, key): (Step.REDIALLING, recovery.stay)
        for key in ("ControlLost", "Broken", "PumpBroken", "NotSent", *_DATA)
    },
    **{(step, "DataAttachedBefore"): (step, recovery.stay) for step in RETURNS},
    (Step.REJOINING, "Hello"): (Step.REJOINING, _ask_again),
    (Step.REJOINING, "LayoutOffer"): (Step.RECOVERING, _dial_data),
    (Step.RECOVERING, "LastDataAttached"): (Step.RELOADING, _tell_residence),
    (Step.RELOADING, "State"): (Step.RELOADING, _loaded),
    (Step.RELOADING, "Run"): (Step.ACTIVE, _go_on),
    **{
        (step, key): (Step.PAUSED, _try_later)
        for step in (Step.REJOINING, Step.RECOVERING, Step.RELOADING)
        for key in (*_FAILS, "HelloUnspoken", "LayoutOfferOther", "StateOther")
    },
    **{(step, key): (step, recovery.stay) for step in RETURNS for key in _PUMP},
    **{(step, "RefuseGone"): (Step.LOST, recovery.lose) for step in RETURNS},
    **{(step, "PauseAsked"): (Step.PAUSED, _hold) for step in RETURNS},
    **{(step, "ResumeAsked"): (Step.REDIALLING, _redial_now) for step in (Step.PAUSED, *RETURNS)},
    **{(step, "Resident"): (Step.SETTLING, _whole) for step in RETURNS},
    **{(step, key): (step, recovery.stay) for step in (Step.SETTLING, Step.RELEASING) for key in (*_LATE, "Connected")},
    (Step.RELEASING, "NotSent"): (Step.COMPLETED, actions.complete),  # its source keeps nothing for it
}
