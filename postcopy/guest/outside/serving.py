"""Outside VMMs as a library: `async with OutsideDestination("unix:PATH", fetch="tcp:HOST:PORT") as destination: ...`.

Processes hand their memory over at a Unix socket; each is served by a migration of its own, from a source that is
dialled for it or from one that dials. What goes wrong with one of them is said in one line and ends that one alone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Self

from postcopy.errors import HostError, PostcopyError, ProtocolError, UsageError
from postcopy.guest.outside.handing import HandedOver, take
from postcopy.guest.outside.keeping import Kept, Migration, Store
from postcopy.guest.outside.session import ROLES, OutsideInterpreter
from postcopy.limits import DIAL_SECONDS, MIGRATION_ID_BYTES, POLL_MAX_NS, PROCESSES_MAX, TOKEN_BYTES
from postcopy.link import by_hand
from postcopy.link.address import Address, UnixAddress
from postcopy.link.control import ControlChannel
from postcopy.link.data import shake_hands
from postcopy.link.dial import dial_fetch
from postcopy.link.interpreter import boot_id
from postcopy.link.listen import Listener, bind, connections, first_message, unbind
from postcopy.link.returning import Known
from postcopy.link.snapshot import find
from postcopy.link.source import SOFTWARE
from postcopy.link.tls import Credentials, versions_over
from postcopy.session.commands import Finish
from postcopy.session.destination import DestinationMachine
from postcopy.session.destination_recovery import take_up
from postcopy.session.events import ControlLost, Received
from postcopy.session.states import State
from postcopy.wire.control import Refuse, Resume
from postcopy.wire.messages import ALL, ASKED_FOR
from postcopy.wire.preamble import Preamble, Security
from postcopy.wire.version import FETCH_SINCE, VERSION, VERSION_MIN

log = logging.getLogger("postcopy.destination")


class OutsideDestination:
    """Serves processes that hand their memory over at `handover`.

    With `fetch` their pages come from the source there, all of them (`push`) or those that are touched; without it
    sources dial `listen`, and each gets the process that has waited longest. `ended` is told of each migration's end,
    `left` once its process is served no more. `give_up_after` is how many seconds a source that dialled may be away
    before the pages that it has are given up, None: for ever. With a `store` processes outlive this agent, and those
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
        self.handover = handover
        self.current: list[OutsideInterpreter] = []
        self.waiting: deque[HandedOver] = deque()
        self._fetch = fetch
        self._tls = tls
        self._pages = ALL if push else ASKED_FOR
        self._poll_max_ns = poll_max_ns
        self._ended = ended
        self._left = left
        self._give_up_after = give_up_after
        self._store = store
        self._taken_up = taken_up
        self._known = Known(PROCESSES_MAX)
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
            if self._fetch is None:
                self.waiting.append(handed)
                await self._wait(handed)
            else:
                await self._serve(handed, self._fetch)

    async def _go_on(self, kept: Kept) -> None:
        """Serve a process that a former agent served, from here on to its end."""
        try:
            handed = HandedOver.take_up(kept)
        except PostcopyError as error:
            log.warning("destination: a process that an agent before this one served is gone: %s", error)
            kept.forget()
            return
        except Exception:
            await asyncio.to_thread(kept.poison)  # whatever it was, the process must not wait for it
            kept.forget()
            raise
        log.info("destination: %s is served again, with %d pages that are here", handed.process, kept.here)
        if handed.gone():
            log.info("destination: %s has ended meanwhile", handed.process)
            handed.close()
        elif kept.whole or kept.migration is not None:
            await self._take_up(handed, kept.migration)
        elif self._fetch is None:
            self.waiting.append(handed)
            await self._wait(handed)
        else:
            await self._serve(handed, self._fetch)

    async def _take_up(self, handed: HandedOver, migration: Migration | None) -> None:
        """Go on with a migration whose source comes back to it, or of which all is here."""
        if migration is None:
            types = ("file",) * len(handed.message.mappings)
            migration = Migration(VERSION, secrets.token_bytes(MIGRATION_ID_BYTES), b"", types)
        interpreter = self._begin(handed, None, migration.migration_id)
        take_up(interpreter.machine, interpreter.now(), migration.version, migration.token)
        try:
            await interpreter.take_up(migration.types)
        except Exception as error:  # whatever it was, the process must not wait for it
            log.exception("destination: %s: it cannot be taken up", handed.process)
            await self._abandon(interpreter, f"it cannot be taken up: {error}")
            return
        if not migration.token:
            interpreter.post(ControlLost(interpreter.now(), "no source has to be told"))
        await self._drive(interpreter, None)

    async def _wait(self, handed: HandedOver) -> None:
        """Keep a process for a source that dials; its end may come before."""
        await handed.gone_for_good()
        if handed in self.waiting:  # and not with a migration, which then is told
            self.waiting.remove(handed)
            log.info("destination: %s has ended, and no source had come", handed.process)
            handed.close()

    async def _serve(self, handed: HandedOver, address: Address) -> None:
        interpreter = self._begin(handed, address)
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

    def _begin(self, handed: HandedOver, address: Address | None, migration_id: bytes = b"") -> OutsideInterpreter:
        identity = (migration_id or secrets.token_bytes(MIGRATION_ID_BYTES), secrets.token_bytes(TOKEN_BYTES))
        machine = DestinationMachine(
            versions_over(self._tls, (VERSION_MIN if address is None else FETCH_SINCE, VERSION)),
            identity,
            SOFTWARE,
            boot_id(),
            OutsideInterpreter.now(),
            pieces=() if address is None else tuple(one.piece for one in handed.message.mappings),
            pages=self._pages if address is not None else ALL,
            recovers=address is None,
            give_up_seconds=self._give_up_after,
        )
        interpreter = OutsideInterpreter(
            machine, handed, dial=address, poll_max_ns=self._poll_max_ns, tls=self._tls is not None
        )
        self.current.append(interpreter)
        if address is None:
            self._known.add(interpreter)
        return interpreter

    # --- a migration, and what follows ----------------------------------------------------------------------------

    async def _drive(self, interpreter: OutsideInterpreter, channel: ControlChannel | None) -> None:
        if channel is not None:
            interpreter.listen(channel)
        watching = asyncio.create_task(self._watch(interpreter))
        try:
            finish = await interpreter.run()
        finally:
            watching.cancel()
        await self._follow(interpreter, finish)

    async def _watch(self, interpreter: OutsideInterpreter) -> None:
        await interpreter.handed.gone_for_good()
        await interpreter.process_ended()

    async def _follow(self, interpreter: OutsideInterpreter, finish: Finish) -> None:
        handed = interpreter.handed
        if finish.state is State.COMPLETED:
            log.info("destination: %s: %s", handed.process, finish.text if handed.lives else "it has ended")
            self._ended(interpreter, finish)
            await self._served(interpreter)
        elif finish.state is State.LOST or self._fetch is not None or not handed.lives:
            await self._abandon(interpreter, finish.text)
            self._ended(interpreter, finish)
        else:
            await self._remove(interpreter)
            self._ended(interpreter, finish)
            self.waiting.append(handed)  # nothing was served: another source may come
            if handed.process.ended.is_set():  # and then nobody may be left who waits for its end
                await self._wait(handed)

    async def _served(self, interpreter: OutsideInterpreter) -> None:
        """Let a process go when it ends, or when its pump does: then nobody serves what it gives back."""
        gone = asyncio.create_task(interpreter.handed.gone_for_good())
        failed = asyncio.create_task(interpreter.failed.wait())
        try:
            await asyncio.wait({gone, failed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            failed.cancel()
        if interpreter.failed.is_set():
            await self._abandon(interpreter, interpreter.trouble)
        else:
            await self._forget(interpreter)

    async def _abandon(self, interpreter: OutsideInterpreter, text: str) -> None:
        """End a process's memory that never comes: poisoned, so that nobody waits for it and nobody sees zeros."""
        handed = interpreter.handed
        if not handed.lives:
            log.info("destination: %s has ended: %s", handed.process, text)
            await self._forget(interpreter)
            return
        await self._lose(handed, await interpreter.stop(), text)
        await self._forget(interpreter)

    async def _lose(self, handed: HandedOver, maps: Sequence[bytes], text: str) -> None:
        try:
            poisoned = await asyncio.to_thread(handed.poison, maps)
        except PostcopyError as error:
            log.error("destination: %s: %s; it waits for its pages for ever: %s", handed.process, text, error)  # noqa: TRY400
            await handed.gone_for_good()
        else:
            log.warning("destination: %s: %s; %d pages are poisoned", handed.process, text, poisoned)

    async def _forget(self, interpreter: OutsideInterpreter) -> None:
        await self._remove(interpreter)
        interpreter.handed.close()

    async def _remove(self, interpreter: OutsideInterpreter) -> None:
        await interpreter.end()
        if interpreter in self.current:
            self.current.remove(interpreter)
            self._left(interpreter)

    # --- sources that dial ----------------------------------------------------------------------------------------

    async def _on_control(self, channel: ControlChannel) -> None:
        first = await first_message(channel)
        if isinstance(first, Resume):
            await self._known.take(channel, first)
            return
        while self.waiting and not self.waiting[0].lives:
            self.waiting.popleft().close()
        if not self.waiting:
            text = "no process waits here that has handed its memory over"
            channel.send(Refuse("busy", text))
            await channel.close()
            raise HostError(text)
        interpreter = self._begin(self.waiting.popleft(), None)
        interpreter.post(Received(interpreter.now(), first))
        self._spawn(self._drive(interpreter, channel))

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

    def lose(self) -> int:
        """Give up what the sources of all paused migrations still have; return how many these are. UsageError: none."""
        paused = [one for one in self.current if by_hand.describe(one) is not None]
        if not paused:
            raise UsageError("no migration can be given up: none is paused, so nothing is lost")
        for one in paused:
            by_hand.lose(one, "given up by the user")
        return len(paused)

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

    async def _leave(self, handed: HandedOver, interpreter: OutsideInterpreter | None) -> bool:
        """Leave one process to itself; return whether it lacks pages."""
        poisoned = 0
        if handed.lives:
            try:
                maps = handed.states() if interpreter is None else await interpreter.stop()
                poisoned = await asyncio.to_thread(handed.poison, maps)
            except HostError as error:
                log.error("destination: %s waits for its pages for ever: %s", handed.process, error)  # noqa: TRY400
                return True
            if poisoned:
                log.error("destination: %s loses %d pages that were still at the source", handed.process, poisoned)
        if interpreter is not None:
            await self._remove(interpreter)
        handed.close()
        return poisoned > 0
