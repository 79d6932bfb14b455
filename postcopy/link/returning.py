"""A source that comes back: who it is, and what it is told.

A control connection that began with Resume enters; the interpreter of its migration gets it, or it is answered here and
closed.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from typing import NoReturn

from postcopy.errors import HostError, PostcopyError
from postcopy.limits import KNOWN_MAX, RELEASE_SECONDS, TOKEN_BYTES
from postcopy.link.control import ControlChannel
from postcopy.link.destination_interpreter import DestinationInterpreter
from postcopy.wire.control import AllPlaced, Refuse, Released, Resume, Welcome
from postcopy.wire.messages import UNKNOWN

log = logging.getLogger("postcopy.destination")


class Known:
    """The migrations of a destination by id, those that go on and the latest others: a source may come back to any."""

    def __init__(self, most: int = KNOWN_MAX) -> None:
        self._most = most
        self._interpreters: dict[bytes, DestinationInterpreter] = {}
        self._answered = asyncio.Event()

    def add(self, interpreter: DestinationInterpreter) -> None:
        """Remember a migration that was let in, at the cost of the oldest that are over and of no other."""
        self._interpreters[interpreter.machine.migration_id] = interpreter
        over = [name for name, one in self._interpreters.items() if one.finish is not None]
        for name in over[: max(0, len(self._interpreters) - self._most)]:
            del self._interpreters[name]

    async def heard(self) -> None:
        """Return when each source whose migration came through knows that it did, however late it asks."""
        while any(one.finish is not None and one.machine.unheard for one in self._interpreters.values()):
            self._answered.clear()
            await self._answered.wait()

    async def take(self, channel: ControlChannel, resume: Resume) -> None:
        """Give the connection to its migration, or answer it and close it; HostError then."""
        interpreter = self._interpreters.get(resume.migration_id)
        proven = interpreter is not None and hmac.compare_digest(resume.token, interpreter.machine.first_token)
        if interpreter is None or not proven:
            await _refuse(channel, Refuse(UNKNOWN, "there is no such migration here"))
        refusal = interpreter.machine.refusal_of_return()
        if refusal is not None:
            await _refuse(channel, refusal)
        if interpreter.finish is None and not interpreter.machine.ended:  # what has ended looks at no event more
            interpreter.rejoin(channel, secrets.token_bytes(TOKEN_BYTES))
        else:
            await answer_late(channel, interpreter)
            self._answered.set()


async def _refuse(channel: ControlChannel, refusal: Refuse) -> NoReturn:
    """Answer and close; whoever listens writes the line, for anybody may come and say that he was here before."""
    channel.send(refusal)
    await channel.close()
    raise HostError(f"it came back to a migration: {refusal.text}")


async def answer_late(channel: ControlChannel, interpreter: DestinationInterpreter) -> None:
    """Tell a source that its pages are needed no more: it may not have heard of it."""
    machine = interpreter.machine
    channel.version = machine.version
    log.info("destination: %s came back to a migration that is completed", channel.name)
    try:
        token = secrets.token_bytes(TOKEN_BYTES)
        channel.send(Welcome(machine.version, machine.migration_id, token, machine.software))
        channel.send(AllPlaced(interpreter.report or {}, interpreter.latencies))
        async with asyncio.timeout(RELEASE_SECONDS):
            machine.acknowledged = isinstance(await channel.receive(), Released)
    except (PostcopyError, TimeoutError, ValueError) as error:  # ValueError: a report that cannot be written
        log.warning("closed %s: %s", channel.name, str(error) or "it did not say that it let go of its memory")
    await channel.close()
