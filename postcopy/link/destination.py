"""The destination as a library: `async with Destination(...) as destination: await destination.migrated()`.

Connections enter through one port; a running guest on complete memory leaves. One migration at a time; after one that
failed before its switchover the destination listens as before, after one that came through it refuses others until the
guest has gone on to somewhere else.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
from collections.abc import Callable, Sequence
from collections.abc import Mapping as ReadOnly
from pathlib import Path
from typing import Self

from postcopy.errors import HostError, LinkError, ProtocolError, UsageError
from postcopy.kernel import Userfaultfd, memory_types_in
from postcopy.limits import CLOSE_SECONDS, MIGRATION_ID_BYTES, POLL_MAX_NS, TOKEN_BYTES
from postcopy.link import by_hand
from postcopy.link.address import Address, UnixAddress, parse_address
from postcopy.link.by_hand import Steered
from postcopy.link.control import ControlChannel
from postcopy.link.data import shake_hands
from postcopy.link.destination_interpreter import DestinationInterpreter
from postcopy.link.guest import Kinds, MigratingGuest
from postcopy.link.interpreter import boot_id
from postcopy.link.listen import Listener, first_message
from postcopy.link.onward import Onward
from postcopy.link.placement import known_mode, known_removal
from postcopy.link.report import Report
from postcopy.link.residence import Extent
from postcopy.link.returning import Known
from postcopy.link.source import SOFTWARE
from postcopy.link.tls import Credentials, versions_over
from postcopy.pages.regions import Layout
from postcopy.pump.destination import DestinationStats
from postcopy.pump.half import Role as DataRole
from postcopy.pump.trace import FaultTrace
from postcopy.session.commands import Finish
from postcopy.session.destination import DestinationMachine
from postcopy.session.events import Received
from postcopy.session.states import OWNERS, SWITCHED, Owner, State
from postcopy.wire.control import Refuse, Resume
from postcopy.wire.preamble import Preamble, Role, Security
from postcopy.wire.version import VERSION, VERSION_MIN

CLOSE_LOOK_SECONDS = 0.05

# What a destination whose latest migration is in such a state has of a guest: nothing.
NO_GUEST = frozenset({State.NONE, State.FAILED, State.CANCELLED})


class BusyError(HostError):
    """The one place for a guest is taken."""

    code = "busy"


class Destination(Steered[DestinationInterpreter]):
    """A host that a guest may come to.

    `kinds` are the kinds of guest that it knows, by name.
    `mode` is "auto", "minor", "missing" or "move". `removal` says what it means where the guest gives pages of shared
    memory back by madvise(2) that are not here yet: "auto" fetches them all the same, for the kernel does not tell
    whether the file keeps them; "discards" makes them zeros, as a balloon means it (see also give_back()).
    `memory_dirs` are mounts of tmpfs or hugetlbfs that memory of their type is put into; without one such memory is a
    memfd of the same page size. With `tls` no connection without it is taken, without it none with it. `give_up_after`
    is how many seconds a migration may be paused before the pages that it lacks are given up, None: for ever.
    `trace` records the faults of the latest migration. `begun` is called with each that takes the place for a guest.
    """

    def __init__(
        self,
        listen: Address | str,
        kinds: Kinds,
        *,
        mode: str = "auto",
        removal: str = "auto",
        memory_dirs: Sequence[Path] = (),
        poll_max_ns: int = POLL_MAX_NS,
        tls: Credentials | None = None,
        trace: FaultTrace | None = None,
        versions: tuple[int, int] = (VERSION_MIN, VERSION),
        give_up_after: float | None = None,
    ) -> None:
        address = parse_address(listen) if isinstance(listen, str) else listen
        if tls is not None and isinstance(address, UnixAddress):
            raise UsageError(f"{address}: a Unix socket has no TLS: the kernel says who is at its other end")
        self.mode = known_mode(mode)
        self.removal = known_removal(removal)
        self.finish: Finish | None = None
        self.begun: Callable[[DestinationInterpreter], object] = lambda _: None
        self._listener = Listener(address, self._on_control, self._on_data, tls)
        self._kinds = kinds
        self._types = memory_types_in(memory_dirs)
        self._poll_max_ns = poll_max_ns
        self._trace = trace
        self._versions = versions_over(tls, versions)
        self._give_up_after = give_up_after
        self.known = Known()  # whose sources may come back
        self._onward: Onward | None = None  # of the guest that the current one brought
        self._before: tuple[DestinationInterpreter | None, Onward | None] = (None, None)
        # whoever has not got the place yet; each with its task, and what is done once it has it or has ended
        self._greeted: dict[DestinationInterpreter, tuple[asyncio.Task[None], asyncio.Event]] = {}
        self._running: asyncio.Task[None] | None = None
        self._ended: asyncio.Queue[Finish] = asyncio.Queue()

    @property
    def address(self) -> Address:
        """Where it listens, with the real port."""
        return self._listener.address

    async def __aenter__(self) -> Self:
        await self._listener.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def migrated(self) -> Finish:
        """Wait for the next end of a migration, whichever it is."""
        return await self._ended.get()

    # --- who comes in -------------------------------------------------------------------------------------

    async def _on_control(self, channel: ControlChannel) -> None:
        """Hear the first message, then give the connection to a migration of its own, or raise what refuses it.

        It becomes the current one, and others are refused, when the source has made an offer: see _claim().
        """
        first = await first_message(channel)
        if isinstance(first, Resume):
            await self.known.take(channel, first)
            return
        busy = self._busy()
        if busy is not None:
            channel.send(Refuse("busy", busy))
            await channel.close()
            raise BusyError(busy)
        interpreter = self._begin()
        interpreter.listen(channel)
        interpreter.post(Received(interpreter.now(), first))
        await self._let_in(interpreter)

    async def _let_in(self, interpreter: DestinationInterpreter) -> None:
        """Return once a source has the place for a guest; LinkError where it has not come so far.

        Up to there it is anybody, who says hello and no more. It costs the listener's patience and no line of its own.
        """
        driving, decided = asyncio.create_task(self._drive(interpreter)), asyncio.Event()
        self._greeted[interpreter] = (driving, decided)
        try:
            await decided.wait()
        except asyncio.CancelledError:
            if self._greeted.pop(interpreter, None) is None:
                return  # it was let in at this very moment
            driving.cancel()
            await asyncio.wait({driving})
            raise
        if interpreter.quiet and interpreter.finish is not None:
            raise LinkError(interpreter.finish.text)

    async def _claim(self, interpreter: DestinationInterpreter) -> None:
        """Give the one place for a guest to a migration that is about to prepare it; BusyError where it is taken."""
        while self._passing() and self._running is not None:
            await asyncio.wait({self._running})
        busy = self._busy()
        if busy is not None:
            raise BusyError(busy)
        if interpreter not in self._greeted:
            raise BusyError("others have taken its place")  # and closed its connection, just now
        running, decided = self._greeted.pop(interpreter)
        decided.set()
        interpreter.speak()
        if not interpreter.machine.probed:
            self.begun(interpreter)
        self._before = (self._current, self._onward)
        self._current, self._onward = interpreter, None
        self._running = running
        self.known.add(interpreter)

    def _passing(self) -> bool:
        """Whether who has the place leaves no guest in it and is over in a moment: nobody is turned away by it.

        It is a question, or a migration that failed before its switchover and is being thrown away: its source knows
        that already, and may be here again.
        """
        if self._current is None or self._running is None or self._running.done():
            return False
        return self._current.machine.probed or self._current.machine.state in {State.FAILED, State.CANCELLED}

    def _busy(self) -> str | None:
        if self._passing():
            return None
        if self._running is not None and not self._running.done():
            return "this destination is in the middle of a migration"
        if self._onward is not None and self._onward.busy:
            return "this destination's guest is leaving it"
        if self.owner is not None:
            return "this destination has a guest already"
        return None

    def _begin(self) -> DestinationInterpreter:
        identity = (secrets.token_bytes(MIGRATION_ID_BYTES), secrets.token_bytes(TOKEN_BYTES))
        now, patience = DestinationInterpreter.now(), self._give_up_after
        machine = DestinationMachine(self._versions, identity, SOFTWARE, boot_id(), now, give_up_seconds=patience)
        interpreter = DestinationInterpreter(
            machine,
            self._kinds,
            self._types,
            claim=self._claim,
            local=isinstance(self.address, UnixAddress),
            mode=self.mode,
            discards=self.removal == "discards",
            trace=self._trace,
            poll_max_ns=self._poll_max_ns,
        )
        interpreter.quiet = True
        return interpreter

    async def _drive(self, interpreter: DestinationInterpreter) -> None:
        try:
            finish = await interpreter.run()
        finally:
            interpreter.drop_files()
            if interpreter in self._greeted:
                self._greeted.pop(interpreter)[1].set()
        if interpreter.quiet:
            return  # it never came so far as to be anybody's migration
        if interpreter.machine.probed:
            self._current, self._onward = self._before  # nobody came: what the latest one left is shown as before
            return
        self.finish = finish
        self._ended.put_nowait(finish)

    async def _on_data(self, preamble: Preamble, connection: socket.socket) -> None:
        """Attach a data connection that knows the migration's id and token; ProtocolError or LinkError otherwise."""
        migration = self._migrating(preamble)
        machine = migration.machine
        known = hmac.compare_digest(preamble.migration_id, machine.migration_id)
        proved = preamble.security is Security.TLS or hmac.compare_digest(preamble.token, machine.token)
        if not known or not proved:  # with TLS the handshake proves it
            raise ProtocolError("a data connection that does not prove itself: unknown migration or wrong token")
        if preamble.role is Role.MEMORY:
            migration.take_memory(connection)
            return
        role: DataRole = "urgent" if preamble.role is Role.URGENT else "push"
        if preamble.security is Security.PLAIN:
            migration.attach(role, connection, None)
            return
        token = machine.token
        with await shake_hands(connection, preamble, token, listens=True) as session:
            if self._migrating(preamble) is not migration or machine.token != token:
                raise ProtocolError("a data connection of a migration, or of an attempt to resume one, that is over")
            migration.attach(role, connection, session)

    def _migrating(self, preamble: Preamble) -> DestinationInterpreter:
        """Return the migration that a data connection can be for."""
        current = self._current
        if preamble.role is Role.MEMORY:  # it may be here before the offer that it belongs to has been read
            offering = (one for one in self._greeted if one.machine.migration_id == preamble.migration_id)
            current = next(offering, current)
        if current is None or current.finish is not None:
            raise ProtocolError("a data connection, and no migration is running")
        return current

    # --- for whoever watches and steers -------------------------------------------------------------------

    async def onward(self) -> Onward:
        """Return the way out for the guest that came here, a Source: always the same for one guest.

        Waits for the last words with its former host. It need not be closed, whatever comes of its migrations. Once the
        guest has left another one may come. Raises UsageError where there is none, or pages of it are missing.
        """
        if self._running is not None and self.state is State.COMPLETED:
            await asyncio.wait({self._running})
        if self._onward is None:
            if self._current is None:
                raise UsageError("there is no guest here")
            self._onward = Onward(self._current, poll_max_ns=self._poll_max_ns, give_up_after=self._give_up_after)
        return self._onward

    @property
    def leaving(self) -> Onward | None:
        """The way out of the latest guest, if it was asked for."""
        return self._onward

    def resume(self) -> None:
        """Let the source come back to a migration that was paused here. UsageError."""
        by_hand.resume(self._current)

    def give_back(self, region: int, offset: int, length: int) -> None:
        """Take whole pages away from the guest (a balloon): they read as zeros from now on and are fetched no more.

        For holes in the file behind its memory, of which the kernel tells nobody; `offset` and `length` in bytes. May
        wait for a page that is just being placed, so call it in a thread. Raises UsageError, LinkError, KernelError.
        """
        if self._current is None:
            raise UsageError("there is no guest's memory here")
        self._current.give_back(region, offset, length)

    def add_view(self, uffd: Userfaultfd, addresses: ReadOnly[int, int]) -> None:
        """Serve another process that maps the guest's memory, too: a device's backend, say.

        It has mapped the files behind regions (`mapping.fd` of what a kind of guest is given) and registered those
        mappings with a userfaultfd of its own, without events, *before* it touches them; `addresses` says where, by the
        number of the region. Its faults are served like the guest's until every page is here; then its memory is
        trapped no more. `uffd` is the destination's from here on, unless this raises: UsageError (no such region,
        memory without a file, events are enabled, an address within a page, too many others), HostError (the range is
        not mapped or not trapped there, its kernel or features do not grant what the guest's mapping has).
        """
        if self._current is None:
            raise UsageError("there is no guest's memory here")
        self._current.add_view(uffd, addresses)

    @property
    def owner(self) -> Owner | None:
        """Who may run the guest of the latest migration, as far as the destination can know; None: no guest comes."""
        current = self._current
        if current is None or current.machine.probed or current.machine.state in NO_GUEST:
            return None
        if self._onward is not None and self._onward.left:
            return None
        return OWNERS[current.machine.state]

    @property
    def guest(self) -> MigratingGuest | None:
        """The guest, from the moment its state is loaded."""
        return None if self._current is None else self._current.guest

    @property
    def layout(self) -> Layout | None:
        """The layout of the guest's memory, from the moment it is allocated."""
        memory = None if self._current is None else self._current.memory
        return None if memory is None else memory.layout

    @property
    def report(self) -> Report | None:
        """What this side knows of the latest migration that came through."""
        return None if self._current is None else self._current.report

    @property
    def lost(self) -> list[Extent] | None:
        """What of the memory is lost, where the guest goes on without it; None: nothing, or it cannot go on so."""
        return None if self._current is None else self._current.lost

    def snapshot(self) -> DestinationStats | None:
        """Return the counters of the latest migration's pump, None where there was none."""
        return None if self._current is None else self._current.snapshot()

    def progress(self) -> tuple[int, int] | None:
        """Return how many of its pages are here and how many faults wait for one, None where there was no pump."""
        return None if self._current is None else self._current.progress()

    def residency(self, cells: int) -> list[float]:
        """Return which part of each of `cells` equal pieces of the guest's memory is here, 0 to 1; [] without one."""
        return [] if self._current is None else self._current.residency(cells)

    async def close(self) -> None:
        """Listen no more, cancel what has not switched over, end the guest if it is whole.

        A guest that is not whole is left as it is: its threads wait for pages, and closing what they wait
        on would let them go on, on zeros. Only the end of the process ends them.
        """
        await self._listener.close()
        if self._onward is not None:
            await self._onward.close()
        current = self._current
        if current is None or (self._running is not None and not await self._over(current, self._running)):
            return
        gone = self._onward is not None and self._onward.left
        if not current.held and (self.owner is Owner.DESTINATION or gone):
            await current.end_guest()

    async def _over(self, current: DestinationInterpreter, running: asyncio.Task[None]) -> bool:
        """Have the running migration end; False where the guest has begun to run here and misses pages.

        A source that says nothing may be sending Run at this moment. It is waited for, but not for ever: this side ends
        in any case, and to a source whose Run meets that end it is the same as a host that fails then.
        """
        self.cancel("the destination ends")
        patience = current.now() + CLOSE_SECONDS
        while not running.done():
            if current.machine.state in SWITCHED:
                return False
            if current.now() > patience and current.channel is not None:
                current.channel.abort()
            await asyncio.wait({running}, timeout=CLOSE_LOOK_SECONDS)
        return True
