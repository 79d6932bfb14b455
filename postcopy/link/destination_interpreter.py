"""Performs the commands of the destination's machine: memory, pump and guest come to life and go. Decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from collections.abc import Mapping as ReadOnly
from typing import Any, Literal

from postcopy.errors import ProtocolError, UsageError
from postcopy.kernel import Userfaultfd
from postcopy.kernel.handover import close_files
from postcopy.limits import FIRST_STEP_SECONDS, GUEST_ARRAY_MAX, GUEST_ELEMENTS_MAX, PROGRESS_SECONDS
from postcopy.link.guest import Kinds, MigratingGuest
from postcopy.link.latencies import latencies
from postcopy.link.prepare import Memory, MemoryTypes, prepare
from postcopy.link.probe import try_out
from postcopy.link.pumping import BEAT_NS
from postcopy.link.residence import Extent
from postcopy.link.rounds import next_round
from postcopy.link.takeover import take_files, take_over
from postcopy.link.way_back import WayBack
from postcopy.pump.destination import DestinationPump
from postcopy.pump.status import PumpStatus
from postcopy.pump.tls import TlsSession
from postcopy.pump.trace import FaultTrace
from postcopy.session.commands import (
    Command,
    Discard,
    DropControl,
    HoldMemory,
    KeepRecord,
    Load,
    MakeReport,
    Prepare,
    Settle,
    StartGuest,
    StartPump,
    StopPump,
    TakeFiles,
    TryOut,
    WatchData,
)
from postcopy.session.destination import DestinationMachine
from postcopy.session.events import (
    Broken,
    Connected,
    ControlLost,
    DataAttached,
    Event,
    FilesTaken,
    GuestLoaded,
    GuestRunning,
    Prepared,
    Progressed,
    PumpFailed,
    Received,
    Resident,
    TriedOut,
)
from postcopy.wire.frame import HEADER_BYTES
from postcopy.wire.latencies import NOTHING
from postcopy.wire.preamble import ACCEPTED
from postcopy.wire.unpack import unpack

# How often the guest's first step is looked for; its time is the guest's own, only the telling waits for
# this.
FIRST_STEP_LOOK_SECONDS = 0.001


log = logging.getLogger("postcopy.session")


class DestinationInterpreter(WayBack):
    """One migration at its destination. Memory and guest belong to it until somebody takes them over after the end.

    `claim` waits for the host's one place for a guest, and raises what refuses it. `local`: both ends are on one host,
    so that memory may be handed over.
    """

    machine: DestinationMachine

    def __init__(
        self,
        machine: DestinationMachine,
        kinds: Kinds,
        types: MemoryTypes,
        *,
        claim: Callable[[DestinationInterpreter], Awaitable[None]],
        local: bool = False,
        mode: str,
        discards: bool = False,
        poll_max_ns: int,
        trace: FaultTrace | None = None,
        name: str = "",
    ) -> None:
        super().__init__(machine, mode, name)
        self._discards = discards
        self.lost: list[Extent] | None = None  # once they were given up and the guest goes on without them
        self.held = False
        self._claim = claim
        self._local = local
        self._files: list[int] = []
        self._memory_came = False
        self._memory: asyncio.Queue[socket.socket] = asyncio.Queue()
        self._taking: asyncio.Task[None] | None = None
        self._kinds = kinds
        self._types = types
        self._poll_max_ns = poll_max_ns
        self._trace = trace
        self._attached: set[str] = set()
        self._working: asyncio.Task[None] | None = None
        self._told_running = False

    def performers(self) -> dict[type[Command], Callable[[Any], Awaitable[None]]]:
        """Return how the destination performs its own commands."""
        return {
            TryOut: self._try_out,
            TakeFiles: self._take_files,
            Prepare: self._prepare,
            StartPump: self._start_pump,
            Load: self._load,
            StartGuest: self._start_guest,
            MakeReport: self._make_report,
            Settle: self._settle,
            StopPump: self._stop_pump,
            WatchData: self._watch_data,
            **self.performers_of_pauses(),
            Discard: self._discard,
            HoldMemory: self._hold_memory,
            KeepRecord: self._keep_record,
        }

    # --- in the order in which a migration needs them -----------------------------------------------------

    async def _try_out(self, command: TryOut) -> None:
        self._working = self.spawn(self._answer_probe(command))

    async def _answer_probe(self, command: TryOut) -> None:
        await self._claim(self)
        answer = await asyncio.to_thread(try_out, command.offer, self.mode, self._kinds, self._types)
        self.post(TriedOut(self.now(), answer))

    def take_memory(self, connection: socket.socket) -> None:
        """Give a proven memory connection to the migration, which owns it then; ProtocolError if none is wanted."""
        if connection.family != socket.AF_UNIX or self._memory_came or self.machine.ended:
            raise ProtocolError("no migration waits for a memory connection")
        self._memory_came = True
        self._memory.put_nowait(connection)

    async def _take_files(self, command: TakeFiles) -> None:
        if not self._local:
            raise UsageError("memory is handed over on one host only, to a destination that listens on unix:PATH")
        self._taking = self.spawn(self._wait_for_files(len(command.offer.regions)))

    async def _wait_for_files(self, count: int) -> None:
        await self._claim(self)
        with await self._memory.get() as connection:
            self._files = await take_files(connection, count)
        self.post(FilesTaken(self.now()))

    async def _prepare(self, command: Prepare) -> None:
        self._working = self.spawn(self._make_room(command))

    async def _make_room(self, command: Prepare) -> None:
        if command.offer.handed_over:
            files, self._files = self._files, []
            self.memory = await asyncio.to_thread(take_over, command.offer, files, self.mode, self._kinds)
        else:
            await self._claim(self)
            known = (command.offer, self.mode, self._kinds, self._types)
            self.memory = await asyncio.to_thread(prepare, *known, discards=self._discards)
        self._pump = self.memory.pump(self._poll_max_ns, BEAT_NS if self.machine.recoverable else 0)
        if self._pump is not None and self._trace is not None:
            self._trace.begin()
            self._pump.trace(self._trace)
        self.post(Prepared(self.now()))

    def attach(self, role: Literal["urgent", "push"], connection: socket.socket, tls: TlsSession | None) -> None:
        """Say to a proven connection that it is attached, and give it to the pump; ProtocolError if none is wanted."""
        if self._pump is None or not self.machine.wants_data:
            raise ProtocolError("no migration waits for a data connection")
        if role in self._attached:
            raise ProtocolError(f"a second connection for {role}")
        # Said first, for the pump takes the session along; nothing uses the connection before Run.
        (connection if tls is None else tls).send(ACCEPTED)
        self._attached.add(role)
        self._pump.attach(role, connection.detach(), tls)
        self.post(DataAttached(self.now(), role, self.machine.token))

    async def _load(self, command: Load) -> None:
        # On the loop's own thread: no memory of the guest is touched, and waking another thread and being woken by it
        # would take longer than this does, with the guest standing still meanwhile.
        self.stopped_at = command.stopped_at
        if self.memory is not None:
            self.guest = self._unpack_guest(self.memory, command.state)
            self.post(GuestLoaded(self.now()))

    def _unpack_guest(self, memory: Memory, state: bytes) -> MigratingGuest:
        limits = {"elements_max": GUEST_ELEMENTS_MAX, "array_max": GUEST_ARRAY_MAX}
        return memory.guest.load(unpack(state, "the guest's state", **limits))

    async def _start_guest(self, _command: StartGuest) -> None:
        if self.guest is None:
            return
        self.guest.start()  # microseconds, and part of the downtime: not worth a thread
        self.run_at = self.now()
        self.spawn(self._watch_first_step(self.guest))
        if self.memory is not None and not self.memory.resident:
            self.spawn(self._watch_progress())
            self.spawn(self._course.follow(lambda: self._pump))

    async def _watch_first_step(self, guest: MigratingGuest) -> None:
        while not self._tell_running(guest):
            await asyncio.sleep(FIRST_STEP_LOOK_SECONDS)

    def _tell_running(self, guest: MigratingGuest) -> bool:
        """Post GuestRunning once the first step is made, and only once."""
        if not self._told_running and (first := guest.first_step_at) is not None:
            self._told_running = True
            self.post(GuestRunning(self.now(), first))
        return self._told_running

    async def _watch_progress(self) -> None:
        while True:
            await next_round(PROGRESS_SECONDS)
            if self._pump is None:
                return
            stats = self._pump.snapshot()
            received = stats.bytes_received_urgent + stats.bytes_received_push - HEADER_BYTES * stats.beats
            faults = stats.faults_missing + stats.faults_minor
            pages = (stats.pages_resident, stats.pages_total)
            waits = latencies(stats.fault_latency, self.guest) if self.machine.tells_latencies else NOTHING
            self.post(Progressed(self.now(), *pages, faults, stats.pending, received, stats.outcomes["retry"], waits))

    async def _step(self, event: Event) -> None:
        # Once every page is here nothing can lose the guest. The event that would say so may be older than the look at
        # the pump that tells, so the pump is looked at again before any event is judged.
        if self._watched and self._pump is not None and self._pump.status().resident:
            self._unwatch()
            channel = self.channel
            await super()._step(self._resident())
            if self.channel is not channel and isinstance(event, Received | Connected | ControlLost | Broken):
                return  # it came over a connection that is left
        await super()._step(event)

    def _resident(self) -> Resident:
        self.resident_at = self.now()
        self._course.look(self._pump)
        return Resident(self.resident_at)

    def _pump_ended(self, status: PumpStatus) -> None:
        if status.resident:
            self.post_first(self._resident())
        else:
            if self.memory is not None and self.memory.resident:
                log.error("destination: faults are trapped no more, the kernel serves them: %s", status.error)
                self.spawn(asyncio.to_thread(self.memory.trap_no_more))
            self.post(PumpFailed(self.now(), status.error or "the pump ended"))

    async def _make_report(self, _command: MakeReport) -> None:
        self.spawn(self._sum_up_after_first_step())

    async def _sum_up_after_first_step(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_STEP_SECONDS):
                if self.guest is not None:
                    await self._watch_first_step(self.guest)
        await self._sum_up()

    async def _settle(self, _command: Settle) -> None:
        if self.memory is not None and not self.memory.resident:
            try:
                await asyncio.to_thread(self.memory.trap_no_more)
            except BaseException:
                self._traps_for_ever = True
                self._told = None
                raise
        await self._sum_up()  # the source may have gone before it was made

    async def _stop_pump(self, command: StopPump) -> None:
        if self._traps_for_ever:
            log.error("destination: faults of the guest are still trapped: their thread stays until the guest ends")
        elif self._pump is not None and self.memory is not None and self.memory.resident:
            log.info("destination: each page of the guest is trapped and mapped when it is touched first")
        else:
            await super()._stop_pump(command)

    async def _discard(self, _command: Discard) -> None:
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait({self._taking})
        if self._working is not None:
            await asyncio.wait({self._working})  # the thread in it cannot be called back
        await super()._stop_pump(StopPump())
        await self.end_guest()

    def drop_files(self) -> None:
        """Close what came of memory that is handed over and was not mapped: once it has ended, nobody else does."""
        while not self._memory.empty():
            self._memory.get_nowait().close()
        files, self._files = self._files, []
        close_files(files)

    async def _drop_control(self, command: DropControl) -> None:
        if self.channel is self._addressed:  # and not one with which the source has come back meanwhile
            await super()._drop_control(command)

    async def _hold_memory(self, _command: HoldMemory) -> None:
        self.held = True

    async def _keep_record(self, _command: KeepRecord) -> None:
        """Keep nothing: the guest ends with this agent."""

    # --- after the end --------------------------------------------------------------------------------------

    def give_back(self, region: int, offset: int, length: int) -> None:
        """Take pages away from the guest; see Destination.give_back."""
        memory = self.memory
        if memory is None:
            raise UsageError("there is no guest's memory here")
        memory.give_back(self._pump, region, offset, length)

    def add_view(self, uffd: Userfaultfd, addresses: ReadOnly[int, int]) -> None:
        """Serve another process that maps the memory, too; see Destination.add_view."""
        if self.memory is None:
            raise UsageError("there is no guest's memory here")
        self.memory.add_view(self._pump, uffd, addresses)

    async def end_guest(self) -> None:
        """End the whole guest and give its memory back, after the migration."""
        self._unwatch()
        if self.report is not None:
            self.stats = self.snapshot()  # the report's, or later ones where the pump served on
        pump, self._pump = self._pump, None
        await asyncio.to_thread(self._end_guest, pump)

    def _end_guest(self, pump: DestinationPump | None) -> None:
        guest, self.guest = self.guest, None
        self._left = guest or self._left
        memory, self.memory = self.memory, None
        if guest is not None:
            guest.close()
        if pump is not None:
            pump.close()
        if memory is not None:
            memory.close()
