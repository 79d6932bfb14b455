"""The source's side where a destination dials for a snapshot's memory: an offer made of what it asks for.

All else is the source's way: no guest has to be stopped, but what is done about that is the interpreter's.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from postcopy.errors import ProtocolError
from postcopy.session.commands import CloseLinks, Command, Finish, Send
from postcopy.session.events import Event, Received
from postcopy.session.source import SourceMachine, accept
from postcopy.session.source_steps import Step
from postcopy.session.states import Owner, State
from postcopy.wire.messages import ALL, GuestOffer, Hello, LayoutOffer, Piece, Refuse, RegionOffer, Welcome

# What its regions and its guest are called: where they come from, and that it is not ours.
REGION_TYPE = "file"
GUEST = GuestOffer("outside", 1)


class FetchedMachine(SourceMachine):
    """One destination's migration of parts of a file of `size` bytes."""

    table: ClassVar = {}

    def __init__(self, hello: Hello, size: int) -> None:
        super().__init__(hello, LayoutOffer((), GUEST), push=False)
        self.size = size
        self.pieces: tuple[Piece, ...] = ()

    @property
    def recoverable(self) -> bool:
        """Say no: it is the destination that dials, and it begins anew."""
        return False

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


FetchedMachine.table = {
    **SourceMachine.table,
    (Step.GREETING, "Welcome"): (Step.OFFERING, _offer),
    (Step.GREETING, "WelcomeUnfit"): (Step.FAILED, _refuse),
}
