"""Performs the commands of a source's machine for one destination that dialled for a snapshot's memory.

A control channel and data connections of the destination enter; pieces of the file go through a pump of their own.
There is no guest to stop, so STATE only names the file; whatever becomes of this destination, it and all others stay.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import msgpack

from postcopy.errors import ProtocolError
from postcopy.kernel.snapshot import SnapshotFile, SnapshotPiece
from postcopy.limits import FRAME_BYTES_MAX
from postcopy.link.dial import DataConnection
from postcopy.link.interpreter import boot_id
from postcopy.link.pumping import BEAT_NS, SourcePumpInterpreter
from postcopy.link.push import Pace, Push
from postcopy.link.residence import Residence
from postcopy.pages.regions import Layout
from postcopy.pump.source import SourcePump
from postcopy.pump.tls import TlsSession
from postcopy.session.commands import (
    Command,
    DialData,
    NoteResidence,
    ReleaseMemory,
    ResumeGuest,
    StartPump,
    StartPush,
    StopGuest,
    StopPump,
    WatchData,
)
from postcopy.session.events import DataConnected, GuestStopped
from postcopy.session.fetched import FetchedMachine
from postcopy.wire.messages import Piece
from postcopy.wire.preamble import ACCEPTED

Role = Literal["urgent", "push"]


def bytes_for(pieces: Sequence[Piece]) -> int:
    """Return what a pump for these pieces takes of memory: see FETCHED_BYTES_MAX."""
    largest = max((piece.page_size for piece in pieces), default=0)
    return 2 * max(FRAME_BYTES_MAX, largest) + sum(piece.size // piece.page_size for piece in pieces)


class FetchedInterpreter(SourcePumpInterpreter):
    """One destination. `name` is its address, for people. close() it after the end.

    `claim` is asked for the bytes of memory that serving it takes, and raises where they are not to be had.
    """

    machine: FetchedMachine

    def __init__(
        self,
        machine: FetchedMachine,
        snapshot: SnapshotFile,
        name: str,
        *,
        claim: Callable[[int], None],
        poll_max_ns: int,
        rate: int | None,
    ) -> None:
        super().__init__(machine, name)
        self.name = name
        self.held_bytes = 0
        self._claim = claim
        self.pace = Pace(rate)
        self.layout: Layout | None = None
        self._residence: Residence | None = None
        self._snapshot = snapshot
        self._pieces: list[SnapshotPiece] = []
        self._poll_max_ns = poll_max_ns
        self._dialled: dict[Role, DataConnection] = {}
        self._complete = asyncio.Event()
        self._attaching: asyncio.Task[None] | None = None
        self._pushing: asyncio.Task[None] | None = None

    def performers(self) -> dict[type[Command], Callable[[Any], Awaitable[None]]]:
        """Return how this source performs its own commands."""
        return {
            NoteResidence: self._note_residence,
            DialData: self._await_data,
            StartPump: self._start_pump,
            StopGuest: self._stop_guest,
            ResumeGuest: self._nothing,
            WatchData: self._watch_data,
            StartPush: self._start_push,
            StopPump: self._stop_pump,
            ReleaseMemory: self._nothing,  # the file is not this destination's
        }

    async def _nothing(self, _command: Command) -> None:
        """Do nothing: nobody runs a guest here."""

    async def _note_residence(self, command: NoteResidence) -> None:
        if self._residence is None:
            self._residence = Residence(self.machine.offer.layout())
        self._residence.add(command.have)

    def take(self, role: Role, connection: socket.socket, tls: TlsSession | None) -> None:
        """Say to a proven connection that it is attached, and keep it; ProtocolError if none is wanted."""
        if not self.machine.pieces or self._complete.is_set() or self.machine.ended:
            raise ProtocolError("no destination waits for a data connection")
        if role in self._dialled:
            raise ProtocolError(f"a second {role} connection")
        (connection if tls is None else tls).send(ACCEPTED)
        self._dialled[role] = DataConnection(connection.detach(), tls)
        if len(self._dialled) == 2:
            self._complete.set()

    async def _await_data(self, _command: DialData) -> None:
        needed = bytes_for(self.machine.pieces)
        self._claim(needed)
        self.held_bytes = needed
        self._attaching = self.spawn(self._attach())

    async def _attach(self) -> None:
        await self._complete.wait()
        self.layout = self.machine.offer.layout()
        for region, piece in zip(self.layout.regions, self.machine.pieces, strict=True):
            self._pieces.append(self._snapshot.piece(region, piece.offset))
        self._pump = SourcePump(self.layout, self._pieces, poll_max_ns=self._poll_max_ns, beat_ns=BEAT_NS)
        if self._residence is not None:
            self._residence.skip_in(self._pump)
        for role in ("urgent", "push"):
            self._pump.attach(role, *self._dialled.pop(role))
        self.post(DataConnected(self.now()))

    async def _stop_guest(self, _command: StopGuest) -> None:
        if self._pump is not None:
            self._pump.guest_stopped()
        # behind the pump's beginning, which remembers when the file was written to last
        name = msgpack.packb({"memory": self._snapshot.name()})
        self.post(GuestStopped(self.now(), name, self.now(), boot_id()))

    async def _start_push(self, _command: StartPush) -> None:
        if self._pump is not None and self.layout is not None:
            self._pushing = self.spawn(Push(self.layout, self._pieces, self._pump, self.pace).run())

    async def _stop_pump(self, command: StopPump) -> None:
        for task in (self._attaching, self._pushing):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        await super()._stop_pump(command)

    def close(self) -> None:
        """Give back what this destination had here."""
        if self._pump is not None:
            self._pump.close()
        for connection in self._dialled.values():
            connection.close()
        for piece in self._pieces:
            piece.close()
        self._dialled.clear()
        self._pieces.clear()
        self.held_bytes = 0
