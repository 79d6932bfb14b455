"""One migration into an outside VMM's memory: how its destination's commands are performed there.

A hand-over and a control channel enter. The process runs already and its faults wait, so the pump begins with RUN and
not before; when all is here it goes on, for pages that the process gives back and for zeros that it never touched,
until the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from postcopy.errors import LinkError
from postcopy.guest.outside.handing import HandedOver
from postcopy.guest.outside.keeping import Migration
from postcopy.guest.outside.memory import OutsideGuest, OutsideMemory
from postcopy.limits import ANSWER_SECONDS, DIAL_SECONDS
from postcopy.link.address import Address
from postcopy.link.destination_interpreter import DestinationInterpreter
from postcopy.link.dial import DataConnection, dial_data
from postcopy.link.pumping import BEAT_NS
from postcopy.pump.destination import DestinationStats
from postcopy.session.commands import Discard, Finish, Prepare, Settle, StartGuest, StartPump, StopPump
from postcopy.session.destination import DestinationMachine
from postcopy.session.events import CancelAsked, ControlLost, DataAttached, Prepared, Resident
from postcopy.session.states import ENDED, SWITCHED, State
from postcopy.wire.control import GuestOffer, LayoutOffer, RegionOffer
from postcopy.wire.preamble import Preamble, Role
from postcopy.wire.version import RECOVERY_SINCE

DataRole = Literal["urgent", "push"]
ROLES: dict[Role, DataRole] = {Role.URGENT: "urgent", Role.PUSH: "push"}


class OutsideInterpreter(DestinationInterpreter):
    """One migration. `dial` is where the data connections are dialled, None: the source does that.

    After the end `finish` says what came of it; end() it once nothing of it is needed any more.
    """

    def __init__(
        self,
        machine: DestinationMachine,
        handed: HandedOver,
        *,
        dial: Address | None,
        poll_max_ns: int,
        tls: bool = False,
    ) -> None:
        mode = "minor" if handed.memory_fd >= 0 else "missing"
        super().__init__(machine, {}, {}, claim=self._claimed, mode=mode, poll_max_ns=poll_max_ns)
        self.handed = handed
        self._dial = dial
        self._encrypts = tls
        self._dialling: asyncio.Task[None] | None = None
        self.failed = asyncio.Event()  # the pump, after the end: pages that are given back wait for it
        self.trouble = ""
        self._served_on = False
        self._unneeded = False  # its process ended before all of its pages had come

    async def _claimed(self, _interpreter: DestinationInterpreter) -> None:
        """Wait for nothing: the memory is this migration's already."""

    async def _make_room(self, command: Prepare) -> None:
        self.memory = await asyncio.to_thread(OutsideMemory.of, self.handed, command.offer)
        # a source that dialled expects to hear from it
        self._pump = self.memory.pump(self._poll_max_ns, BEAT_NS if self.machine.version >= RECOVERY_SINCE else 0)
        if self._dial is None:
            self.post(Prepared(self.now()))
        elif not self.machine.ended:
            self._dialling = self.spawn(self._dial_both(self._dial))

    async def _dial_both(self, address: Address) -> None:
        """Dial, and be prepared then. A task of its own: a source that does not answer holds no end up."""
        try:
            async with asyncio.timeout(DIAL_SECONDS + ANSWER_SECONDS):
                dialled = await self._dial_roles(address)
        except TimeoutError as error:
            raise LinkError(f"{address} did not accept the data connections in time") from error
        self.post(Prepared(self.now()))
        for role, connection in dialled:
            if self._pump is not None:
                self._pump.attach(role, *connection)
            self.post(DataAttached(self.now(), role, self.machine.token))

    async def _dial_roles(self, address: Address) -> list[tuple[DataRole, DataConnection]]:
        machine, dialled = self.machine, []
        try:
            for role, name in ROLES.items():
                preamble = Preamble(role, machine.version, machine.migration_id, machine.token)
                dialled.append((name, await dial_data(address, preamble, tls=self._encrypts)))
        except BaseException:
            for _, connection in dialled:
                connection.close()
            raise
        return dialled

    async def _start_pump(self, command: StartPump) -> None:
        """Do nothing yet: faults wait already, and the source may not be asked before RUN."""

    async def _start_guest(self, command: StartGuest) -> None:
        if self.handed.kept is not None and self.memory is not None and self._dial is None:
            machine, types = self.machine, tuple(region.type for region in self.memory.layout.regions)
            self.handed.kept.note(Migration(machine.version, machine.migration_id, machine.first_token, types))
        await super()._start_pump(StartPump())
        await super()._start_guest(command)
        if not self.handed.lives:
            await self.process_ended()

    async def take_up(self, types: Sequence[str]) -> None:
        """Serve the process with what a killed agent left of it, until its source comes back: see machine.take_up."""
        regions = zip(types, self.handed.message.mappings, strict=True)
        offers = tuple(RegionOffer(kind, one.page_size, one.size) for kind, one in regions)
        guest = GuestOffer(OutsideGuest.kind, OutsideGuest.vcpus)
        self.memory = await asyncio.to_thread(OutsideMemory.of, self.handed, LayoutOffer(offers, guest))
        self._pump = self.memory.pump(self._poll_max_ns, BEAT_NS)
        if self._pump is None:
            return
        self._pump.part()
        self._pump.watch()
        self.guest = self.memory.guest.load(None)
        await super()._start_pump(StartPump())
        await super()._start_guest(StartGuest())
        stats = self._pump.snapshot()
        if stats.pages_resident == stats.pages_total:
            self.post(self._resident())

    async def process_ended(self) -> None:
        """Bring the migration to its end: nobody needs anything of it any more."""
        state = self.machine.state
        if state in SWITCHED and self._pump is not None:
            self._unwatch()
            await asyncio.to_thread(self._pump.stop)
            self._unneeded = not self._pump.status().resident
            self.post_first(self._resident())
            if self.channel is None:  # the source is away, and is told when it comes back
                self.post(ControlLost(self.now(), "the source is away"))
        elif state not in ENDED:
            self.post(CancelAsked(self.now(), f"{self.handed.process} has ended"))

    def _resident(self) -> Resident:
        """Go on watching the pump, which serves until the process ends."""
        if self._pump is not None and not self._served_on:
            asyncio.get_running_loop().add_reader(self._pump.event_fd, self._woke_after_all)
            self._served_on = True
            self._woke_after_all()  # what was told together with the last page has been read
        return super()._resident()

    def _woke_after_all(self) -> None:
        if self._pump is None:
            return
        with contextlib.suppress(BlockingIOError):
            os.read(self._pump.event_fd, 8)
        status = self._pump.status()
        if status.state == "failed":
            self._unwatch()
            self.trouble = status.error or "the pump ended"
            self.failed.set()

    def _unwatch(self) -> None:
        super()._unwatch()
        if self._served_on and self._pump is not None:
            asyncio.get_running_loop().remove_reader(self._pump.event_fd)
            self._served_on = False

    def left(self, stats: DestinationStats) -> int:
        """Return what a process that has ended never touched."""
        return stats.pages_total - stats.pages_resident

    async def _settle(self, _command: Settle) -> None:
        self._sum_up()  # the source may have gone before it was made

    async def _stop_pump(self, _command: StopPump) -> None:
        """Leave the pump running: see the module's docstring."""

    async def _discard(self, _command: Discard) -> None:
        if self._working is not None:
            await asyncio.wait({self._working})  # the thread in it cannot be called back
        if self._dialling is not None:
            self._dialling.cancel()
            await asyncio.wait({self._dialling})

    async def _finish(self, command: Finish) -> None:
        if self._unneeded and command.state is State.COMPLETED:
            command = replace(command, text=f"{self.handed.process} has ended and needs nothing more")
        await super()._finish(command)

    # --- after the end ------------------------------------------------------------------------------------

    async def stop(self) -> list[bytes]:
        """End the pump; return what is known of each region's pages."""
        pump = self._pump
        if pump is None:
            return self.handed.states()
        self._unwatch()
        await asyncio.to_thread(pump.stop)
        return [bytes(pump.page_map(number)) for number in range(len(self.handed.message.mappings))]

    async def end(self) -> None:
        """Give back what this process has of it; the hand-over stays."""
        await super()._stop_pump(StopPump())
        if self.memory is not None:
            self.memory.close()
