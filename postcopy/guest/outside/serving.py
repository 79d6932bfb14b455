"""Outside VMMs as a library: `async with OutsideDestination("unix:PATH", fetch="tcp:HOST:PORT") as destination: ...`.

Processes hand their memory over at a Unix socket; each is served by a migration of its own, from a source that is
dialled for it or from one that dials. Who comes in, and what a person may want, is here; what becomes of it is in
following.py. What goes wrong with one of them is said in one line and ends that one alone.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Self

from postcopy.errors import HostError, LinkError, PostcopyError, ProtocolError, UsageError
from postcopy.guest.outside.following import Following
from postcopy.guest.outside.handing import HandedOver, take
from postcopy.guest.outside.keeping import Kept, Migration, Store
from postcopy.guest.outside.session import ROLES, OutsideInterpreter, identity_of, new_identity
from postcopy.limits import DIAL_SECONDS, POLL_MAX_NS, PROCESSES_MAX
from postcopy.link import by_hand
from postcopy.link.address import Address, UnixAddress
from postcopy.link.control import ControlChannel
from postcopy.link.data import shake_hands
from postcopy.link.dial import dial_fetch
from postcopy.link.endpoint import Endpoint
from postcopy.link.interpreter import boot_id
from postcopy.link.listen import Listener, bind, connections, first_message, unbind
from postcopy.link.snapshot import find
from postcopy.link.source import SOFTWARE
from postcopy.link.tls import Credentials, versions_over
from postcopy.session import destination_recovery, fetching
from postcopy.session.commands import Finish, Send
from postcopy.session.destination import DestinationMachine
from postcopy.session.events import ControlLost, Received, WorkFailed
from postcopy.session.fetching import NAMELESS, FetchingMachine
from postcopy.session.offered import OfferedMachine
from postcopy.session.states import State
from postcopy.wire.control import LayoutOffer, Message, Probe, Refuse, Resume
from postcopy.wire.messages import ALL, ASKED_FOR
from postcopy.wire.preamble import Preamble, Security
from postcopy.wire.version import FETCH_SINCE, VERSION, VERSION_MIN

log = logging.getLogger("postcopy.destination")


class OutsideDestination(Following):
    """Serves processes that hand their memory over at `handover`.

    With `fetch` their pages come from the source there, all of them (`push`) or those that are touched; without it
    sources dial `listen`, and each gets the process that has waited longest. `ended` is told of each migration's end,
    `left` once its process is served no more. `give_up_after` is how many seconds a source may be away before the
    pages that it has are given up, None: for ever. With a `store` processes outlive this agent, and those
    that are `taken_up` have outlived a former one.
    """

    def __init__(
        self,
        handover: UnixAddress,
        *,
        fetch: Address | None = None,
        listen: Address | None = None,
        push: bool = True,
        poll_max_ns: int = POLL_MAX_NS,
        ended: Callable[[OutsideInterpreter, Finish], None] = lambda _one, _finish: None,
        left: Callable[[OutsideInterpreter], None] = lambda _one: None,
        tls: Credentials | None = None,
        give_up_after: float | None = None,
        store: Store | None = None,
        taken_up: Sequence[Kept] = (),
    ) -> None:
        super().__init__(fetches=fetch is not None, ended=ended, left=left)
        self.handover = handover
        self._endpoint = None if fetch is None else Endpoint(fetch)
        self._tls = tls
        self._pages = ALL if push else ASKED_FOR
        self._poll_max_ns = poll_max_ns
        self._give_up_after = give_up_after
        self._store = store
        self._taken_up = taken_up
        self._listener = None if listen is None else Listener(listen, self._on_control, self._on_data, tls)
        self._socket: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._hearings = asyncio.Semaphore(PROCESSES_MAX)

    @property
    def address(self) -> Address:
        """Where sources dial, or else where processes hand over."""
        return self.handover if self._listener is None else self._listener.address

    async def __aenter__(self) -> Self:
        self._socket = bind(self.handover)
        if self._listener is not None:
            await self._listener.open()
        for kept in self._taken_up:
            self._spawn(self._go_on(kept))
        self._spawn(self._accept(self._socket))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("destination: internal error", exc_info=task.exception())

    # --- processes come in ----------------------------------------------------------------------------------------

    async def _accept(self, listening: socket.socket) -> None:
        async for connection in connections(listening):
            await self._hearings.acquire()
            self._spawn(self._hear(connection))

    async def _hear(self, connection: socket.socket) -> None:
        """Serve one process from its first word to its end."""
        with connection:
            try:
                handed = await take(connection, in_place=self._store is None)
            except PostcopyError as error:
                log.warning("refused memory that was handed over: %s", error)
                return
            except Exception:  # a mistake of ours: one process hears of it, and all others are still served
                log.exception("destination: closed a process that would hand its memory over: internal error")
                return
            finally:
                self._hearings.release()
            log.info("destination: %s handed %s over", handed.process, handed.message.describe())
            try:
                if len(self.current) + len(self.waiting) >= PROCESSES_MAX:
                    raise HostError(f"{PROCESSES_MAX} processes are served here already")  # noqa: TRY301
                if self._store is not None:
                    handed.keep(self._store, connection)
            except Exception as error:  # whatever it was, the process must not wait for it
                await self._lose(handed, handed.states(), f"it cannot be served: {error}")
                handed.close()
                if not isinstance(error, PostcopyError | OSError):
                    raise
                return
            await self._begin_with(handed)

    async def _begin_with(self, handed: HandedOver) -> None:
        """Dial for a process, or keep it for a source that dials."""
        if self._endpoint is None:
            self.waiting.append(handed)
            self._freed.set()
            await self._wait(handed)
        else:
            await self._serve(handed, self._endpoint)

    async def _go_on(self, kept: Kept) -> None:
        """Serve a process that a former agent served, from here on to its end."""
        try:
            handed = HandedOver.take_up(kept)
        except Exception as error:  # whatever it was, the process must not wait for it
            log.log(
                logging.WARNING if isinstance(error, PostcopyError) else logging.ERROR,
                "destination: a process that an agent before this one served is gone, or not served any more: %s",
                error,
            )
            await self._give_up(kept)
            if not isinstance(error, PostcopyError):
                raise
            return
        log.info("destination: %s is served again, with %d pages that are here", handed.process, kept.here)
        if handed.gone():
            log.info("destination: %s has ended meanwhile", handed.process)
            handed.close()
        elif kept.whole or kept.migration is not None:
            await self._take_up(handed, kept.migration)
        else:
            await self._begin_with(handed)

    async def _give_up(self, kept: Kept) -> None:
        """Let go of a process that cannot be watched, with all of it poisoned that is not here."""
        try:
            await asyncio.to_thread(kept.poison)
        except HostError as refused:  # and to let go of it would give it zeros
            log.error("destination: a process waits for its pages for ever: %s", refused)  # noqa: TRY400
        else:
            kept.forget()

    async def _take_up(self, handed: HandedOver, migration: Migration | None) -> None:
        """Go on with a migration whose source is to be found again, or of which all is here."""
        if migration is None:
            types = ("file",) * len(handed.message.mappings)
            migration = Migration(VERSION, new_identity()[0], b"", types)
        interpreter = self._begin(handed, self._endpoint if migration.memory else None, migration)
        machine = interpreter.machine
        if isinstance(machine, FetchingMachine):
            fetching.take_up(machine, interpreter.now(), migration.version, migration.memory, held=migration.held)
        else:
            identity = (migration.version, migration.token)
            destination_recovery.take_up(machine, interpreter.now(), *identity, held=migration.held)
        lacks = handed.kept is not None and not handed.kept.whole
        if migration.memory == NAMELESS and lacks:
            await self._end_untaken(interpreter, "its source named no memory, so none can be told to be that")
            return
        if migration.held and lacks:
            log.warning("destination: %s: somebody paused it: it waits for postcopy resume", handed.process)
        try:
            await interpreter.take_up(migration.types)
        except Exception as error:  # whatever it was, the process must not wait for it
            log.exception("destination: %s: it cannot be taken up", handed.process)
            await self._end_untaken(interpreter, f"it cannot be taken up: {error}")
            return
        if not migration.token:
            interpreter.post(ControlLost(interpreter.now(), "no source has to be told"))
        await self._drive(interpreter, None)

    async def _end_untaken(self, interpreter: OutsideInterpreter, text: str) -> None:
        """End a migration that a former agent began, and that cannot go on."""
        commands = interpreter.machine.give_up(WorkFailed(interpreter.now(), "internal", text))
        interpreter.finish = next(one for one in commands if isinstance(one, Finish))  # a source that comes is told
        await self._abandon(interpreter, text)

    async def _serve(self, handed: HandedOver, endpoint: Endpoint) -> None:
        interpreter, address = self._begin(handed, endpoint), endpoint.good
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                channel = await dial_fetch(address, self._tls)
        except TimeoutError:
            await self._abandon(interpreter, f"cannot connect to {address}: no answer within {DIAL_SECONDS:g} s")
        except PostcopyError as error:
            await self._abandon(interpreter, str(error))
        except Exception as error:  # a mistake of ours: the process must not wait for it
            log.exception("destination: %s: internal error", handed.process)
            await self._abandon(interpreter, f"internal error: {error!r}")
        else:
            interpreter.machine.begin(interpreter.now())
            await self._drive(interpreter, channel)

    def _begin(
        self, handed: HandedOver, endpoint: Endpoint | None, former: Migration | None = None
    ) -> OutsideInterpreter:
        return self._interpret(handed, self._machine(handed if endpoint is not None else None, former), endpoint)

    def _machine(self, fetches_for: HandedOver | None, former: Migration | None = None) -> DestinationMachine:
        """Make the machine of a migration: of one that is fetched for a process, or of one that a source begins."""
        kind = OfferedMachine if fetches_for is None else FetchingMachine
        return kind(
            versions_over(self._tls, (VERSION_MIN if fetches_for is None else FETCH_SINCE, VERSION)),
            new_identity() if former is None else identity_of(former),
            SOFTWARE,
            boot_id(),
            OutsideInterpreter.now(),
            pieces=() if fetches_for is None else tuple(one.piece for one in fetches_for.message.mappings),
            pages=self._pages if fetches_for is not None else ALL,
            give_up_seconds=self._give_up_after,
        )

    def _interpret(
        self, handed: HandedOver, machine: DestinationMachine, endpoint: Endpoint | None
    ) -> OutsideInterpreter:
        waits = self._poll_max_ns
        interpreter = OutsideInterpreter(machine, handed, endpoint=endpoint, poll_max_ns=waits, tls=self._tls)
        self.current.append(interpreter)
        if endpoint is None:
            self._known.add(interpreter)
        return interpreter

    # --- sources that dial ----------------------------------------------------------------------------------------

    async def _on_control(self, channel: ControlChannel) -> None:
        first = await first_message(channel)
        if isinstance(first, Resume):
            await self._known.take(channel, first)
            return
        machine = self._machine(None)
        offer = await self._greet(channel, machine, first)
        interpreter = self._interpret(await self._next_waiting(channel), machine, None)
        interpreter.post(Received(interpreter.now(), offer))
        self._spawn(self._drive(interpreter, channel))

    async def _greet(self, channel: ControlChannel, machine: DestinationMachine, first: Message) -> Message:
        """Answer who says Hello, and return what he offers. LinkError, ProtocolError: he is not a source that does.

        No process waits for it, for up to here anybody comes: he costs a connection that has not proved itself.
        """
        for command in machine.handle(Received(OutsideInterpreter.now(), first)):
            if isinstance(command, Send):
                channel.send(command.message)
            elif isinstance(command, Finish):
                await channel.close()
                raise LinkError(command.text)
        channel.version = machine.version
        offer = await first_message(channel)
        if not isinstance(offer, LayoutOffer | Probe):
            said = getattr(offer, "text", "")
            raise ProtocolError(f"it answered welcome by {type(offer).__name__.lower()}{said and ': '}{said}")
        return offer

    async def _next_waiting(self, channel: ControlChannel) -> HandedOver:
        """Take the process that has waited longest; HostError where there is none, and none is about to be freed."""
        try:
            with self._turns.asked(channel):
                handed = await self._wait_for_turn(channel)
        finally:
            self._freed.set()  # for who is next now
        if handed is not None:
            return handed
        text = "no process waits here that has handed its memory over"
        channel.send(Refuse("busy", text))
        await channel.close()
        raise HostError(text)

    async def _on_data(self, preamble: Preamble, connection: socket.socket) -> None:
        """Attach a data connection to the migration that it proves to be of; ProtocolError or LinkError otherwise."""
        interpreter = find(preamble, self.current)
        role = ROLES[preamble.role]
        if preamble.security is Security.PLAIN:
            interpreter.attach(role, connection, None)
            return
        token = interpreter.machine.token
        with await shake_hands(connection, preamble, token, listens=True) as session:
            if interpreter not in self.current or interpreter.machine.token != token:
                raise ProtocolError("a data connection of a migration, or of an attempt to resume one, that is over")
            interpreter.attach(role, connection, session)

    # --- what a person may want, of all migrations together -------------------------------------------------------

    def pause(self) -> int:
        """Close the connections of all migrations that miss pages, until resume(); return how many. UsageError: none.

        A process goes on with what is here, and waits where it touches anything else.
        """
        return self._ask(by_hand.pause, {State.POSTCOPY_ACTIVE, *by_hand.PAUSED}, "paused: none misses pages")

    def resume(self, address: Address | None = None) -> int:
        """Have all paused migrations go on, with `address` from another agent that has the same memory. UsageError.

        Where that one does not answer they are fetched from the former one as well, in turn.
        """
        if address is not None and self._endpoint is None:
            raise UsageError("it is the source that dials: say --to to its agent")
        count = self._ask(by_hand.resume, by_hand.PAUSED, "resumed: none is paused")
        if address is not None and self._endpoint is not None:
            self._endpoint.move_to(address)
        return count

    def lose(self) -> int:
        """Give up what the sources of all paused migrations still have; return how many these are. UsageError: none."""
        return self._ask(
            lambda one: by_hand.lose(one, "given up by the user"),
            by_hand.PAUSED,
            "given up: none is paused, so nothing is lost",
        )

    def _ask(self, wish: Callable[[OutsideInterpreter], None], states: Collection[State], none: str) -> int:
        able = (one for one in self.current if one.finish is None and one.machine.recoverable)
        meant = [one for one in able if one.machine.state in states]
        if not meant:
            raise UsageError(f"no migration can be {none}")
        for one in meant:
            wish(one)
        return len(meant)

    # --- the end --------------------------------------------------------------------------------------------------

    async def close(self) -> int:
        """Listen no more and leave every process to itself; return how many lack pages.

        What is missing for good is poisoned, what is zeros the kernel gives from now on.
        """
        if self._listener is not None:
            await self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            unbind(self._socket, self.handover)
            self._socket = None
        lacking = 0
        for interpreter in list(self.current):
            if interpreter.channel is not None:
                interpreter.channel.abort()
            lacking += await self._leave(interpreter.handed, interpreter)
        while self.waiting:
            lacking += await self._leave(self.waiting.popleft(), None)
        return lacking
