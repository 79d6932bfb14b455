"""The source's side where a destination dials for a snapshot's memory: an offer made of what it asks for.

Up to Run all else is the source's way: no guest has to be stopped, but what is done about that is the interpreter's.
After it nothing here has to outlive a connection. The file is there for everybody, and a destination that comes back
asks anew and says what it has; so when a connection ends this migration does, and nothing is lost by it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from postcopy.errors import ProtocolError
from postcopy.limits import SILENCE_SECONDS
from postcopy.session import source_recovery as recovery
from postcopy.session.commands import CloseLinks, Command, Finish, Send, StopPump, WatchData
from postcopy.session.events import Event, PumpFailed, Received, Started
from postcopy.session.source import SourceMachine, accept
from postcopy.session.source_steps import Step
from postcopy.session.states import Owner, State
from postcopy.wire.messages import (
    ALL,
    GONE,
    Alive,
    GuestOffer,
    Hello,
    LayoutOffer,
    Message,
    Piece,
    Refuse,
    RegionOffer,
    Run,
    Welcome,
)

# What its regions and its guest are called: where they come from, and that it is not ours.
REGION_TYPE = "file"
GUEST = GuestOffer("outside", 1)


class FetchedMachine(SourceMachine):
    """One destination's migration of parts of a file of `size` bytes, from its Welcome on: `hello` was said before."""

    table: ClassVar = {}
    shows_latencies: ClassVar = False  # nobody looks, and whoever may fetch could have it keep very many

    def __init__(self, hello: Hello, size: int) -> None:
        super().__init__(hello, LayoutOffer((), GUEST), push=False)
        self.size = size
        self.pieces: tuple[Piece, ...] = ()

    @property
    def recoverable(self) -> bool:
        """Say no: it is the destination that dials, and for this side it begins anew."""
        return False

    def _deadline(self, now: float, entered: bool) -> float | None:
        if self.step is Step.ACTIVE:  # whoever fetches speaks a version in which silence is soon noticed
            return (now if entered else max(self.heard_at, self.timeline.run_sent)) + SILENCE_SECONDS
        return super()._deadline(now, entered)

    def key(self, event: Event) -> str:
        """Tell a destination that asks for more than there is."""
        match event:
            case Received(message=Welcome() as welcome) if unfit(welcome, self.size):
                return "WelcomeUnfit"
            case _:
                return super().key(event)


def unfit(welcome: Welcome, size: int) -> str:
    """Say why pieces of a file of `size` bytes cannot be had, "" where they can."""
    for number, piece in enumerate(welcome.pieces):
        what = f"mapping {number} ({piece.size} bytes from {piece.offset} on)"
        if piece.page_size & (piece.page_size - 1):
            return f"{what}: page size {piece.page_size} is not a power of two"
        if (piece.offset | piece.size) % piece.page_size:
            return f"{what}: these are no whole pages of {piece.page_size} bytes"
        if piece.size > size or piece.offset > size - piece.size:
            return f"{what}: this is beyond the snapshot's memory file, which has {size} bytes"
    order = sorted(range(len(welcome.pieces)), key=lambda number: welcome.pieces[number].offset)
    for first, second in pairwise(order):
        if welcome.pieces[first].offset + welcome.pieces[first].size > welcome.pieces[second].offset:
            return f"mappings {first} and {second} are of the same part of the snapshot's memory file"
    return ""


def _start(machine: FetchedMachine, _event: Started) -> list[Command]:
    machine.timeline.started = machine.now
    return []


def _offer(machine: FetchedMachine, welcome: Welcome) -> list[Command]:
    if not welcome.pieces:
        raise ProtocolError("the destination asks for nothing")
    machine.pieces = welcome.pieces
    machine.push = welcome.pages == ALL
    regions = tuple(RegionOffer(REGION_TYPE, piece.page_size, piece.size) for piece in welcome.pieces)
    machine.offer = LayoutOffer(regions, GUEST)
    machine.pages = sum(piece.size // piece.page_size for piece in welcome.pieces)
    return accept(machine, welcome)


def _refuse(machine: FetchedMachine, welcome: Welcome) -> list[Command]:
    text = unfit(welcome, machine.size)
    return [Send(Refuse("layout", text)), CloseLinks(), Finish(State.FAILED, Owner.SOURCE, text, 4)]


def _run(machine: FetchedMachine, _loaded: Message) -> list[Command]:
    machine.timeline.run_sent = machine.now
    return [Send(Run()), WatchData()]


def _running(machine: FetchedMachine, _running: Message) -> list[Command]:
    return machine.begin_push()  # no guest stood still for it


def _say_alive(_machine: FetchedMachine, _event: Event) -> list[Command]:
    return [Send(Alive())]


def _part(machine: FetchedMachine, subject: Event | Message) -> list[Command]:
    """Let a destination go that still lacks pages: it comes back for them, or to another agent that has the file."""
    text = f"{machine.why(subject)}; the destination lacks pages, and may come back for them"
    return [StopPump(), CloseLinks(), Finish(State.CANCELLED, Owner.DESTINATION, text, 5)]


def _lose(_machine: FetchedMachine, event: PumpFailed) -> list[Command]:
    """Say that what is missing will never come: the file is not what it was."""
    text = f"lost after the switchover: {event.text}"
    return [Send(Refuse(GONE, event.text)), StopPump(), CloseLinks(), Finish(State.LOST, Owner.LOST, text, 6)]


FetchedMachine.table = {
    **SourceMachine.table,
    (Step.IDLE, "Started"): (Step.GREETING, _start),
    (Step.OFFERING, "Have"): (Step.OFFERING, recovery.take_residence),
    (Step.LOADING, "Loaded"): (Step.ACTIVE, _run),
    (Step.ACTIVE, "Running"): (Step.ACTIVE, _running),
    (Step.ACTIVE, "AliveDue"): (Step.ACTIVE, _say_alive),
    **{(Step.ACTIVE, key): (Step.CANCELLED, _part) for key in ("Severed", "CancelAsked")},
    (Step.ACTIVE, "PumpFailed"): (Step.LOST, _lose),
    (Step.GREETING, "Welcome"): (Step.OFFERING, _offer),
    (Step.GREETING, "WelcomeUnfit"): (Step.FAILED, _refuse),
}
