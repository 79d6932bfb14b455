"""Performs the commands of the source's machine: dials, stops and resumes the guest, runs pump and push."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import msgpack

from postcopy.errors import PostcopyError
from postcopy.kernel import Mapping
from postcopy.kernel.handover import send_files
from postcopy.limits import PARK_AT_ONCE_SECONDS
from postcopy.link.address import Address
from postcopy.link.dial import dial_control, dial_data
from postcopy.link.endpoint import Endpoint
from postcopy.link.guest import MigratingGuest
from postcopy.link.interpreter import boot_id
from postcopy.link.keeping import Keeping, KeptGuest, Record
from postcopy.link.pumping import BEAT_NS, SourcePumpInterpreter
from postcopy.link.push import Pace, Push
from postcopy.link.residence import Residence
from postcopy.link.tls import Credentials
from postcopy.pages.regions import Layout
from postcopy.pump.source import SourcePump, SourceStats
from postcopy.session.commands import (
    Command,
    Connect,
    DialData,
    DropControl,
    HandOver,
    KeepRecord,
    NoteResidence,
    ReleaseMemory,
    ResumeGuest,
    StartPump,
    StartPush,
    StopGuest,
    StopPump,
    WatchData,
)
from postcopy.session.events import (
    Connected,
    DataConnected,
    FilesHanded,
    GuestStopped,
    PushAsked,
)
from postcopy.session.source import SourceMachine
from postcopy.session.states import OWNERS, SWITCHED, Owner, State
from postcopy.wire.preamble import FILES, Preamble, Role


class SourceInterpreter(SourcePumpInterpreter):
    """One migration at its source. The guest and the mappings are borrowed; ReleaseMemory closes both."""

    machine: SourceMachine

    def __init__(
        self,
        machine: SourceMachine,
        endpoint: Endpoint,
        layout: Layout,
        mappings: Sequence[Mapping],
        guest: MigratingGuest,
        *,
        poll_max_ns: int,
        rate: int | None,
        keeping: Keeping | None = None,
        tls: Credentials | None = None,
    ) -> None:
        super().__init__(machine)
        self.pace = Pace(rate)
        self._endpoint = endpoint
        self._address = endpoint.good  # of the attempt under way
        self._tls = tls
        self.encrypted = tls is not None  # whoever dials knows before he has
        self._keeping = keeping
        self._record: Record | None = None  # what was kept, from then on
        self.unmade: PostcopyError | None = None  # why the guest that was kept could not be made here
        self._state = b""
        self._boot_id = boot_id()  # read now, not while the guest stands still
        self._layout = layout
        self._mappings = mappings
        self._guest = guest
        self._poll_max_ns = poll_max_ns
        self._residence = Residence(layout)
        self._before: SourceStats | None = None  # counters of former pumps
        self._connecting: asyncio.Task[None] | None = None
        self._guest_stopped = False
        self._dialling: asyncio.Task[None] | None = None
        self._pushing: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    def performers(self) -> dict[type[Command], Callable[[Any], Awaitable[None]]]:
        """Return how the source performs its own commands."""
        return {
            Connect: self._connect,
            NoteResidence: self._note_residence,
            DialData: self._dial_data,
            WatchData: self._watch_data,
            HandOver: self._hand_over,
            StartPump: self._start_pump,
            StopGuest: self._stop_guest,
            KeepRecord: self._keep_record,
            ResumeGuest: self._resume_guest,
            StartPush: self._start_push,
            StopPump: self._stop_pump,
            ReleaseMemory: self._release_memory,
        }

    # --- in the order in which a migration needs them -----------------------------------------------------

    async def _connect(self, _command: Connect) -> None:
        self._residence = Residence(self._layout)
        self._address = self._endpoint.at(self.machine.attempts)
        self._connecting = self.spawn(self._dial_control())

    async def _dial_control(self) -> None:
        channel = await dial_control(self._address, self._tls)
        channel.version = self.machine.version or channel.version
        self.listen(channel)
        self.post(Connected(self.now()), channel)

    async def _drop_control(self, command: DropControl) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        await super()._drop_control(command)

    async def _note_residence(self, command: NoteResidence) -> None:
        self._residence.add(command.have)

    async def _dial_data(self, command: DialData) -> None:
        beat_ns = BEAT_NS if self.machine.recoverable else 0
        self._pump = SourcePump(self._layout, self._mappings, poll_max_ns=self._poll_max_ns, beat_ns=beat_ns)
        if self._guest_stopped:
            self._pump.guest_stopped()
        self._residence.skip_in(self._pump)
        self.pace.restart()
        self._dialling = self.spawn(self._dial_roles(self._pump, command))

    async def _dial_roles(self, pump: SourcePump, command: DialData) -> None:
        version = self.machine.version
        for role in (Role.URGENT, Role.PUSH):
            preamble = Preamble(role, version, command.migration_id, command.token)
            connection = await dial_data(self._address, preamble, tls=self._tls is not None)
            pump.attach("urgent" if role is Role.URGENT else "push", *connection)
        self.post(DataConnected(self.now()))

    async def _start_pump(self, command: StartPump) -> None:
        self._endpoint.answered(self._address)
        self.note_change(**self._where())
        await super()._start_pump(command)

    async def _hand_over(self, command: HandOver) -> None:
        self._dialling = self.spawn(self._hand_files(command))

    async def _hand_files(self, command: HandOver) -> None:
        preamble = Preamble(Role.MEMORY, self.machine.version, command.migration_id, command.token)
        accepted = await dial_data(self._address, preamble)
        with socket.socket(fileno=accepted.fd) as connection:
            send_files(connection, FILES, [mapping.fd for mapping in self._mappings])
            self.post(FilesHanded(self.now()))

    async def _stop_guest(self, _command: StopGuest) -> None:
        self._stopping = self.spawn(self._stop_and_save())

    async def _stop_and_save(self) -> None:
        # A vCPU parks within microseconds: waking a thread to wait for that would be most of the downtime. One that is
        # held up in an access gets that thread, for it may take its time and the loop may not.
        try:
            self._guest.stop(PARK_AT_ONCE_SECONDS)
        except PostcopyError:
            await asyncio.to_thread(self._guest.stop)
        self._guest_stopped = True
        if self._pump is not None:
            self._pump.guest_stopped()
        self._state = state = msgpack.packb(self._guest.save())
        stopped_at = self._guest.last_step_at or self.now()
        self.post(GuestStopped(self.now(), state, stopped_at, self._boot_id))

    async def _keep_record(self, _command: KeepRecord) -> None:
        if self._keeping is None:
            return
        machine, when = self.machine, self.machine.timeline
        wished = self._record is not None and self._record.push  # also by what the machine has not heard of yet
        self._record = Record(
            version=machine.version,
            migration_id=machine.migration_id,
            token=machine.first_token,
            **self._where(),
            regions=tuple((region.type, region.page_size, region.size) for region in self._layout.regions),
            guest=(self._guest.kind, self._guest.vcpus),
            tls=self._tls is not None,
            state=self._state,
            push=machine.push or machine.pushing or wished,
            held=machine.held,
            rate=self.pace.rate,
            started=when.started,
            stopped=when.stopped,
            stopped_at=when.stopped_at,
            run_sent=when.run_sent,
        )
        self._keeping.keep(self._record.pack())

    def _where(self) -> dict[str, str]:
        """Return what a record says of where the destination is."""
        return {"address": str(self._endpoint.good), "elsewhere": str(self._endpoint.elsewhere or "")}

    def take_up(self, record: Record) -> None:
        """Begin in the place of an agent that is gone: the guest stands still here for good."""
        self._guest_stopped = True
        self._record, self._state = record, record.state

    def note_change(self, **changed: Any) -> None:
        """Have it kept, too, where a migration that is under way changes in what its record says."""
        before = self._record
        if self._keeping is not None and before is not None and before != (now := replace(before, **changed)):
            self._record = now
            self._keeping.keep(now.pack())

    async def _resume_guest(self, _command: ResumeGuest) -> None:
        if self._stopping is not None:
            await asyncio.wait({self._stopping})  # the thread in it cannot be called back
        if isinstance(self._guest, KeptGuest) and not await self._made(self._guest):
            return
        if self._keeping is not None:
            self._keeping.forget()
        self._record = None
        self._guest.start()  # microseconds: nothing that a thread could fail at comes between the guest and its vCPUs

    async def _made(self, guest: KeptGuest) -> bool:
        """Make it; False where that fails: then it is kept for another agent, as if this one had not been."""
        try:
            await asyncio.to_thread(guest.make)
        except PostcopyError as error:
            self.unmade = error
        return self.unmade is None

    async def _start_push(self, _command: StartPush) -> None:
        if self._pump is not None and (self._pushing is None or self._pushing.done()):
            self._pushing = self.spawn(Push(self._layout, self._mappings, self._pump, self.pace).run())

    async def _stop_pump(self, command: StopPump) -> None:
        # Whoever still works for the pump ends before it does.
        for task in (self._dialling, self._pushing):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        if self._pump is None:
            return
        await super()._stop_pump(command)
        if self.stats is not None and self._before is not None:
            self.stats = self._before.plus(self.stats)
        self._before = self.stats

    def snapshot(self) -> SourceStats | None:
        """Return the counters of all pumps that this migration has had."""
        stats = super().snapshot()
        whole = stats is None or self._before is None or self._pump is None
        return stats if whole or self._before is None or stats is None else self._before.plus(stats)

    async def _release_memory(self, _command: ReleaseMemory) -> None:
        await asyncio.to_thread(self._let_go)

    def _let_go(self) -> None:
        if self._keeping is not None:
            self._keeping.release()
        self._guest.close()
        for mapping in self._mappings:
            mapping.close()

    # --- for whoever watches ------------------------------------------------------------------------------

    def residency(self, cells: int) -> list[float]:
        """Return which part of each of `cells` pieces of memory has left; [] while only the destination may know."""
        state = self.machine.state
        if OWNERS[state] is Owner.SOURCE:
            return [0.0] * cells
        if state is State.COMPLETED or (state in SWITCHED and self.machine.offer.handed_over):
            return [1.0] * cells
        known = self._pump is not None and state in SWITCHED - {State.POSTCOPY_PAUSED}
        return self._pump.residency(cells) if self._pump is not None and known else []

    def ask_push(self) -> None:
        """Wish for a push in a migration that was begun without one; the machine says when it begins."""
        self.post(PushAsked(self.now()))
        self.note_change(push=True)

    def set_rate(self, rate: int | None) -> None:
        """Limit the push from now on."""
        self.pace.rate = rate
        self.note_change(rate=rate)

    def move_to(self, address: Address) -> None:
        """Dial there, too, from now on."""
        self._endpoint.move_to(address)
        self.note_change(**self._where())
