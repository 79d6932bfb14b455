"""One migration into an outside VMM's memory: how its destination's commands are performed there.

A hand-over and a control channel enter. The process runs already and its faults wait, so the pump begins with RUN and
not before; when all is here it goes on, for pages that the process gives back and for zeros that it never touched,
until the process ends. Where this side dials it is also the one that dials again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from postcopy.errors import LinkError, PostcopyError
from postcopy.guest.outside.handing import HandedOver
from postcopy.guest.outside.keeping import Migration
from postcopy.guest.outside.memory import OutsideGuest, OutsideMemory
from postcopy.limits import ANSWER_SECONDS, DIAL_SECONDS, TOKEN_BYTES
from postcopy.link.address import Address
from postcopy.link.destination_interpreter import DestinationInterpreter
from postcopy.link.dial import DataConnection, dial_data, dial_fetch
from postcopy.link.endpoint import Endpoint
from postcopy.link.pumping import BEAT_NS
from postcopy.link.tls import Credentials
from postcopy.pump.destination import DestinationStats
from postcopy.session.commands import (
    Command,
    Connect,
    DialData,
    Discard,
    DropControl,
    Finish,
    KeepRecord,
    Prepare,
    ResumePump,
    Settle,
    StartGuest,
    StartPump,
    StopPump,
)
from postcopy.session.destination import DestinationMachine
from postcopy.session.events import (
    CancelAsked,
    Connected,
    ControlLost,
    DataAttached,
    DialFailed,
    Prepared,
    Resident,
)
from postcopy.session.fetching import FetchingMachine
from postcopy.session.states import ENDED, SWITCHED, State
from postcopy.wire.control import GuestOffer, LayoutOffer, RegionOffer
from postcopy.wire.identity import belongs, id_of, renewed
from postcopy.wire.preamble import Preamble, Role
from postcopy.wire.version import RECOVERY_SINCE

log = logging.getLogger("postcopy.destination")

DataRole = Literal["urgent", "push"]
NEEDS_NOTHING = "has ended and needs nothing more"
ROLES: dict[Role, DataRole] = {Role.URGENT: "urgent", Role.PUSH: "push"}


def new_identity() -> tuple[bytes, bytes]:
    """Return the id and the first token of a migration."""
    token = secrets.token_bytes(TOKEN_BYTES)
    return id_of(token), token


def identity_of(former: Migration) -> tuple[bytes, bytes]:
    """Return the id and the token with which to go on with what a former agent began.

    Another where it fetched and was older than the rule by which a source believes an id: it may come back as anybody.
    """
    identity = (former.migration_id, former.token)
    return identity if not former.memory or belongs(*identity) else new_identity()


class OutsideInterpreter(DestinationInterpreter):
    """One migration. `endpoint` is where its source is dialled, None: the source does that. With `tls` encrypted.

    After the end `finish` says what came of it; end() it once nothing of it is needed any more.
    """

    def __init__(
        self,
        machine: DestinationMachine,
        handed: HandedOver,
        *,
        endpoint: Endpoint | None,
        poll_max_ns: int,
        tls: Credentials | None = None,
    ) -> None:
        mode = "minor" if handed.memory_fd >= 0 else "missing"
        name = str(handed.process)
        super().__init__(machine, {}, {}, claim=self._claimed, mode=mode, poll_max_ns=poll_max_ns, name=name)
        self.handed = handed
        self._endpoint = endpoint
        self._address = None if endpoint is None else endpoint.good  # of the attempt under way
        self._tls = tls
        self.encrypted = endpoint is not None and tls is not None  # whoever dials knows before he has
        self._dialling: asyncio.Task[None] | None = None
        self.failed = asyncio.Event()  # the pump, after the end: pages that are given back wait for it
        self.trouble = ""
        self._served_on = False
        self._unneeded = False  # its process ended before all of its pages had come

    def performers(self) -> dict[type[Command], Callable[[Any], Awaitable[None]]]:
        """Return how these commands are performed, and those of a side that dials."""
        return {**super().performers(), Connect: self._connect, DialData: self._dial_data}

    async def _claimed(self, _interpreter: DestinationInterpreter) -> None:
        """Wait for nothing: the memory is this migration's already."""

    async def _make_room(self, command: Prepare) -> None:
        self.memory = await asyncio.to_thread(OutsideMemory.of, self.handed, command.offer)
        # a source that dialled expects to hear from it
        self._pump = self.memory.pump(self._poll_max_ns, BEAT_NS if self.machine.version >= RECOVERY_SINCE else 0)
        if self._address is None:
            self.post(Prepared(self.now()))
        elif not self.machine.ended:
            self._dialling = self.spawn(self._dial_first(self._address))

    async def _dial_first(self, address: Address) -> None:
        """Dial, and be prepared then. A task of its own: a source that does not answer holds no end up."""
        dialled = await self._dial_both(address)
        self.post(Prepared(self.now()))
        self._take(dialled)

    async def _dial_both(self, address: Address) -> list[tuple[DataRole, DataConnection]]:
        machine, dialled = self.machine, []
        try:
            async with asyncio.timeout(DIAL_SECONDS + ANSWER_SECONDS):
                for role, name in ROLES.items():
                    preamble = Preamble(role, machine.version, machine.migration_id, machine.token)
                    dialled.append((name, await dial_data(address, preamble, tls=self._tls is not None)))
        except BaseException as error:
            for _, connection in dialled:
                connection.close()
            if isinstance(error, TimeoutError):
                raise LinkError(f"{address} did not accept the data connections in time") from error
            raise
        return dialled

    def _take(self, dialled: Sequence[tuple[DataRole, DataConnection]]) -> None:
        for role, connection in dialled:
            if self._pump is not None:
                self._pump.attach(role, *connection)
            self.post(DataAttached(self.now(), role, self.machine.token))

    # --- on the way back, where this side dials -----------------------------------------------------------

    async def _connect(self, _command: Connect) -> None:
        if self._endpoint is not None:
            self._address = self._endpoint.at(self.machine.attempts)
            self._dialling = self.spawn(self._dial_again(self._dial_control, self._address))

    async def _dial_control(self, address: Address) -> None:
        channel = await dial_fetch(address, self._tls)
        self.listen(channel)
        token = renewed(self.machine.first_token, secrets.token_bytes(TOKEN_BYTES))
        self.post(Connected(self.now(), token), channel)

    async def _dial_data(self, _command: DialData) -> None:
        if self._address is not None:
            self._dialling = self.spawn(self._dial_again(self._dial_and_take, self._address))

    async def _dial_and_take(self, address: Address) -> None:
        self._take(await self._dial_both(address))

    async def _dial_again(self, dial: Callable[[Address], Awaitable[None]], address: Address) -> None:
        """Dial; what fails there is no failure of this side's own work."""
        try:
            await dial(address)
        except (PostcopyError, OSError) as error:
            self.post(DialFailed(self.now(), str(error)))

    async def _drop_control(self, command: DropControl) -> None:
        if self._endpoint is None:
            await super()._drop_control(command)
            return
        await self._dial_no_more()
        self._leave_channel()  # of whatever attempt: nobody but itself could have brought another one meanwhile

    async def _resume_pump(self, command: ResumePump) -> None:
        if self._endpoint is not None and self._address is not None:
            self._endpoint.answered(self._address)
        await super()._resume_pump(command)

    async def _dial_no_more(self) -> None:
        if self._dialling is not None:
            self._dialling.cancel()
            await asyncio.wait({self._dialling})

    # --- the process is served ----------------------------------------------------------------------------

    async def _start_pump(self, command: StartPump) -> None:
        """Do nothing yet: faults wait already, and the source may not be asked before RUN."""

    async def _start_guest(self, command: StartGuest) -> None:
        if self.handed.kept is not None and self.memory is not None:
            machine, types = self.machine, tuple(region.type for region in self.memory.layout.regions)
            memory = machine.memory if isinstance(machine, FetchingMachine) else b""
            identity = (machine.version, machine.migration_id, machine.first_token)
            self.handed.kept.note(Migration(*identity, types, memory, held=machine.held))
        await super()._start_pump(StartPump())
        await super()._start_guest(command)
        if not self.handed.lives:
            await self.process_ended()

    async def _keep_record(self, _command: KeepRecord) -> None:
        kept = self.handed.kept
        if kept is None or kept.migration is None:
            return
        try:
            kept.note(replace(kept.migration, held=self.machine.held))
        except (PostcopyError, OSError) as error:  # no reason to lose the process
            log.error("%s: an agent after this one will not know whether it is paused by hand: %s", self.called, error)  # noqa: TRY400

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

    @property
    def serves_on(self) -> bool:
        """Say so: a process gives pages back, and touches what is zeros, until it ends."""
        return True

    def left(self, stats: DestinationStats) -> int:
        """Return what a process that has ended never touched."""
        return stats.pages_total - stats.pages_resident

    async def _settle(self, _command: Settle) -> None:
        await self._sum_up()  # the source may have gone before it was made

    async def _stop_pump(self, _command: StopPump) -> None:
        """Leave the pump running: see the module's docstring."""

    async def _discard(self, _command: Discard) -> None:
        if self._working is not None:
            await asyncio.wait({self._working})  # the thread in it cannot be called back
        await self._dial_no_more()

    async def _finish(self, command: Finish) -> None:
        unneeded = self._unneeded and command.state is State.COMPLETED
        await super()._finish(replace(command, text=f"it {NEEDS_NOTHING}") if unneeded else command)
        if unneeded:  # and whoever asks for the latest end is told of which process it was
            self.finish = replace(command, text=f"{self.handed.process} {NEEDS_NOTHING}")

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
