"""A snapshot's memory as a library: `async with Snapshot(path, "tcp:HOST:PORT") as snapshot: ...`.

A file and a port enter; any number of destinations fetch from it at once, each a migration of its own. None of them can
harm the file, the others or this process.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self, TypeVar

from postcopy.errors import HostError, ProtocolError
from postcopy.kernel.snapshot import SnapshotFile
from postcopy.limits import CLOSE_SECONDS, DESTINATIONS_MAX, FETCHED_BYTES_MAX, GONE_MAX, POLL_MAX_NS
from postcopy.link.address import Address, parse_address
from postcopy.link.control import ControlChannel
from postcopy.link.data import shake_hands
from postcopy.link.fetched import FetchedInterpreter
from postcopy.link.fetched import Role as DataRole
from postcopy.link.listen import Listener, first_message
from postcopy.link.source import SOFTWARE
from postcopy.link.tls import Credentials
from postcopy.pages.units import format_size
from postcopy.session.events import CancelAsked, Received, Started
from postcopy.session.fetched import FetchedMachine
from postcopy.session.states import State
from postcopy.wire.control import Hello, Refuse, Welcome
from postcopy.wire.identity import belongs
from postcopy.wire.messages import GONE
from postcopy.wire.preamble import Preamble, Role, Security
from postcopy.wire.version import FETCH_SINCE, VERSION

log = logging.getLogger("postcopy.source")


class Migrating(Protocol):
    """One of the migrations that a port serves at a time."""

    @property
    def machine(self) -> Any:
        """Its side's machine, with `migration_id` and `token`."""


MigratingT = TypeVar("MigratingT", bound=Migrating)


def find(preamble: Preamble, migrations: Iterable[MigratingT]) -> MigratingT:
    """Return the migration that a data connection belongs to; ProtocolError where it does not prove that.

    With TLS what proves it is the handshake that follows.
    """
    if preamble.role in {Role.URGENT, Role.PUSH}:
        for one in migrations:
            known = hmac.compare_digest(preamble.migration_id, one.machine.migration_id)
            if known and (preamble.security is Security.TLS or hmac.compare_digest(preamble.token, one.machine.token)):
                return one
    raise ProtocolError("a data connection that does not prove itself: unknown migration or wrong token")


async def _refuse(channel: ControlChannel, refusal: Refuse) -> NoReturn:
    channel.send(refusal)
    await channel.close()
    raise HostError(refusal.text)


class Snapshot:
    """A memory file that destinations fetch. `rate` limits the push to each of them, in bytes a second.

    `ended` is called with each destination after its end. Raises UsageError for a file that cannot be read.
    """

    def __init__(
        self,
        path: Path,
        listen: Address | str,
        *,
        rate: int | None = None,
        poll_max_ns: int = POLL_MAX_NS,
        ended: Callable[[FetchedInterpreter], None] = lambda _: None,
        tls: Credentials | None = None,
    ) -> None:
        self.rate = rate
        self.current: dict[FetchedInterpreter, asyncio.Task[None]] = {}
        self.file = SnapshotFile(path)
        self._gone: dict[bytes, str] = {}  # why the memory of a migration will never come, by its id
        self._poll_max_ns = poll_max_ns
        self._ended = ended
        address = parse_address(listen) if isinstance(listen, str) else listen
        self._listener = Listener(address, self._on_fetch, self._on_data, tls, opening=Role.FETCH)

    @property
    def address(self) -> Address:
        """Where it listens, with the real port."""
        return self._listener.address

    async def __aenter__(self) -> Self:
        await self._listener.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _on_fetch(self, channel: ControlChannel) -> None:
        hello = Hello((FETCH_SINCE, VERSION), SOFTWARE)
        channel.send(hello)
        welcome = await first_message(channel)  # a stranger is let in no further than here
        if not isinstance(welcome, Welcome):
            said = getattr(welcome, "text", "")
            raise ProtocolError(f"it answered hello by {type(welcome).__name__.lower()}{said and ': '}{said}")
        if not belongs(welcome.migration_id, welcome.token):  # before it is anybody's here, or told of anybody
            await _refuse(channel, Refuse("protocol", "the migration id is not of this token: it is somebody else's"))
        if welcome.migration_id in self._gone:  # it may not have heard of it
            await _refuse(channel, Refuse(GONE, self._gone[welcome.migration_id]))
        if len(self.current) >= DESTINATIONS_MAX:
            text = f"{DESTINATIONS_MAX} destinations fetch from this source already"
            await _refuse(channel, Refuse("busy", text))
        machine = FetchedMachine(hello, self.file.size)
        interpreter = FetchedInterpreter(
            machine, self.file, channel.name, claim=self._claim, poll_max_ns=self._poll_max_ns, rate=self.rate
        )
        interpreter.post(Started(interpreter.now()))
        interpreter.post(Received(interpreter.now(), welcome))
        interpreter.listen(channel)
        log.info("source: %s fetches", channel.name)
        self.current[interpreter] = asyncio.create_task(self._drive(interpreter))

    def _claim(self, needed: int) -> None:
        """Let a destination have memory for its buffers, of what all of them may have together."""
        held = sum(one.held_bytes for one in self.current)
        if held + needed > FETCHED_BYTES_MAX:
            raise HostError(
                f"{format_size(needed)} of buffers are asked for, and others have {format_size(held)} of the "
                f"{format_size(FETCHED_BYTES_MAX)} that this source gives to all together"
            )

    async def _drive(self, interpreter: FetchedInterpreter) -> None:
        try:
            finish = await interpreter.run()
            if finish.state is State.LOST:
                self._gone[interpreter.machine.migration_id] = finish.text
                if len(self._gone) > GONE_MAX:
                    del self._gone[next(iter(self._gone))]
        finally:
            interpreter.close()
            del self.current[interpreter]
            self._ended(interpreter)

    async def _on_data(self, preamble: Preamble, connection: socket.socket) -> None:
        """Give a data connection to the destination that it proves to be of; ProtocolError or LinkError otherwise."""
        # the latest first: who came back goes by the name of the fetch that he broke off
        interpreter = find(preamble, reversed(self.current))
        role: DataRole = "urgent" if preamble.role is Role.URGENT else "push"
        if preamble.security is Security.PLAIN:
            interpreter.take(role, connection, None)
            return
        session = await shake_hands(connection, preamble, interpreter.machine.token, listens=True)
        try:
            interpreter.take(role, connection, session)  # which keeps it until READY
        except BaseException:
            session.close()
            raise

    def set_rate(self, rate: int | None) -> None:
        """Limit the push to each destination, those that fetch now and those to come; 0 or None: not at all."""
        self.rate = rate
        for interpreter in self.current:
            interpreter.pace.rate = rate

    @property
    def unserved(self) -> int:
        """How many destinations still need this source."""
        return sum(one.machine.state is State.POSTCOPY_ACTIVE for one in self.current)

    async def close(self) -> None:
        """Listen no more, end what has not begun, leave everyone else waiting for the rest of their pages."""
        await self._listener.close()
        for interpreter in self.current:
            interpreter.post(CancelAsked(interpreter.now(), "the source ends"))
        if self.current:
            await asyncio.wait(set(self.current.values()), timeout=CLOSE_SECONDS)
        self.file.close()
