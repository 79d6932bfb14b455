"""Performs the commands of the source's machine: dials, stops and resumes the guest, runs pump and push."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgpack

from postcopy.errors import PostcopyError
from postcopy.kernel import Mapping
from postcopy.kernel.handover import send_files
from postcopy.link.address import Address
from postcopy.link.dial import dial_control, dial_data
from postcopy.link.guest import MigratingGuest
from postcopy.link.interpreter import boot_id
from postcopy.link.pumping import PumpInterpreter
from postcopy.link.push import Pace, Push
from postcopy.link.tls import Credentials
from postcopy.pages.regions import Layout
from postcopy.pump.source import SourcePump, SourceStats
from postcopy.pump.status import PumpStatus
from postcopy.session.commands import (
    Command,
    Connect,
    DialData,
    HandOver,
    ReleaseMemory,
    ResumeGuest,
    StartPump,
    StartPush,
    StopGuest,
    StopPump,
)
from postcopy.session.events import Connected, DataConnected, FilesHanded, GuestStopped, PumpFailed, PushAsked
from postcopy.session.source import SourceMachine
from postcopy.wire.preamble import FILES, Preamble, Role

# How long the loop itself waits for the vCPUs to park before a thread waits for them.
PARK_AT_ONCE_SECONDS = 0.002


class SourceInterpreter(PumpInterpreter[SourcePump, SourceStats]):
    """One migration at its source. The guest and the mappings are borrowed; ReleaseMemory closes both."""

    machine: SourceMachine

    def __init__(
        self,
        machine: SourceMachine,
        address: Address,
        layout: Layout,
        mappings: Sequence[Mapping],
        guest: MigratingGuest,
        *,
        poll_max_ns: int,
        rate: int | None,
        tls: Credentials | None = None,
    ) -> None:
        super().__init__("source", machine)
        self.pace = Pace(rate)
        self._address = address
        self._tls = tls
        self._layout = layout
        self._mappings = mappings
        self._guest = guest
        self._poll_max_ns = poll_max_ns
        self._dialling: asyncio.Task[None] | None = None
        self._pushing: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    def performers(self) -> dict[type[Command], Callable[[Any], Awaitable[None]]]:
        """Return how the source performs its own commands."""
        return {
            Connect: self._connect,
            DialData: self._dial_data,
            HandOver: self._hand_over,
            StartPump: self._start_pump,
            StopGuest: self._stop_guest,
            ResumeGuest: self._resume_guest,
            StartPush: self._start_push,
            StopPump: self._stop_pump,
            ReleaseMemory: self._release_memory,
        }

    # --- in the order in which a migration needs them -----------------------------------------------------

    async def _connect(self, _command: Connect) -> None:
        self.spawn(self._dial_control())

    async def _dial_control(self) -> None:
        self.listen(await dial_control(self._address, self._tls))
        self.post(Connected(self.now()))

    async def _dial_data(self, command: DialData) -> None:
        self._pump = SourcePump(self._layout, self._mappings, poll_max_ns=self._poll_max_ns)
        self._dialling = self.spawn(self._dial_roles(self._pump, command))

    async def _dial_roles(self, pump: SourcePump, command: DialData) -> None:
        version = self.machine.version
        for role in (Role.URGENT, Role.PUSH):
            preamble = Preamble(role, version, command.migration_id, command.token)
            connection = await dial_data(self._address, preamble, tls=self._tls is not None)
            pump.attach("urgent" if role is Role.URGENT else "push", *connection)
        self.post(DataConnected(self.now()))

    async def _hand_over(self, command: HandOver) -> None:
        self._dialling = self.spawn(self._hand_files(command))

    async def _hand_files(self, command: HandOver) -> None:
        preamble = Preamble(Role.MEMORY, self.machine.version, command.migration_id, command.token)
        accepted = await dial_data(self._address, preamble)
        with socket.socket(fileno=accepted.fd) as connection:
            send_files(connection, FILES, [mapping.fd for mapping in self._mappings])
            self.post(FilesHanded(self.now()))

    def _pump_ended(self, status: PumpStatus) -> None:
        self.post(PumpFailed(self.now(), status.error or "the pump ended"))

    async def _stop_guest(self, _command: StopGuest) -> None:
        self._stopping = self.spawn(self._stop_and_save())

    async def _stop_and_save(self) -> None:
        # A vCPU parks within microseconds: waking a thread to wait for that would be most of the downtime. One that is
        # held up in an access gets that thread, for it may take its time and the loop may not.
        try:
            self._guest.stop(PARK_AT_ONCE_SECONDS)
        except PostcopyError:
            await asyncio.to_thread(self._guest.stop)
        if self._pump is not None:
            self._pump.guest_stopped()
        state: bytes = msgpack.packb(self._guest.save())
        stopped_at = self._guest.last_step_at or self.now()
        self.post(GuestStopped(self.now(), state, stopped_at, boot_id()))

    async def _resume_guest(self, _command: ResumeGuest) -> None:
        if self._stopping is not None:
            await asyncio.wait({self._stopping})  # the thread in it cannot be called back
        self._guest.start()  # microseconds: nothing that a thread could fail at comes between the guest and its vCPUs

    async def _start_push(self, _command: StartPush) -> None:
        if self._pump is not None and (self._pushing is None or self._pushing.done()):
            self._pushing = self.spawn(Push(self._layout, self._mappings, self._pump, self.pace).run())

    async def _stop_pump(self, command: StopPump) -> None:
        # Whoever still works for the pump ends before it does.
        for task in (self._dialling, self._pushing):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        await super()._stop_pump(command)

    async def _release_memory(self, _command: ReleaseMemory) -> None:
        await asyncio.to_thread(self._let_go)

    def _let_go(self) -> None:
        self._guest.close()
        for mapping in self._mappings:
            mapping.close()

    # --- for whoever watches ------------------------------------------------------------------------------

    def ask_push(self) -> None:
        """Wish for a push in a migration that was begun without one; the machine says when it begins."""
        self.post(PushAsked(self.now()))
