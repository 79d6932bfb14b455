"""The admin socket of a daemon: a Unix socket that only its owner and root may use.

Requests {"command", "arguments"} enter; any number of {"progress": map} and {"alive": true}, then one {"result": map}
or {"error": map} leave. One request a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agent.frames import read_map, write_map
from agent.requests import judge
from postcopy.errors import MigrationLost, MigrationPaused, Owner, PostcopyError, ProtocolError, UsageError
from postcopy.limits import (
    ADMIN_ALIVE_SECONDS,
    ADMIN_REQUEST_SECONDS,
    ADMIN_SILENCE_SECONDS,
    ADMIN_UNREAD_BYTES_MAX,
    FLUSH_SECONDS,
    KEEPER_GONE_SECONDS,
)
from postcopy.link.address import TcpAddress, UnixAddress, parse_address
from postcopy.link.listen import bind
from postcopy.link.rounds import next_round
from postcopy.link.sockets import check_peer
from postcopy.session.states import SWITCHED, State

log = logging.getLogger("postcopy.admin")

KEEPER_LOOK_SECONDS = 0.02


Tell = Callable[[dict[str, Any]], None]
Handler = Callable[[dict[str, Any], Tell], Awaitable[dict[str, Any]]]


class RemoteError(PostcopyError):
    """What a daemon answered instead of a result; it brings the daemon's exit status and the guest's owner along."""

    def __init__(self, text: str, exit_status: int, owner: Owner | None = None) -> None:
        super().__init__(text)
        self.exit_status = exit_status
        self.owner = owner


def admin_address(text: str) -> UnixAddress:
    """Return the address of an admin socket; UsageError for one that others could reach."""
    address = parse_address(text)
    if isinstance(address, TcpAddress):
        raise UsageError(f"admin address {text!r}: it has to be unix:PATH")
    return address


class AdminServer:
    """Serves `commands`, each a coroutine function (arguments, tell) -> result."""

    def __init__(self, address: UnixAddress, commands: dict[str, Handler]) -> None:
        self._address = address
        self._commands = commands
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen, with mode 0600 from the first moment; UsageError where the path cannot be had."""
        self._server = await asyncio.start_unix_server(self._accept, sock=bind(self._address))

    async def close(self) -> None:
        """Listen no more and give answers that are due a moment."""
        if self._server is None:
            return
        self._server.close()
        if self._serving:
            await asyncio.wait(self._serving, timeout=FLUSH_SECONDS)
        Path(self._address.path).unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
        try:
            async with asyncio.timeout(ADMIN_REQUEST_SECONDS):
                request = await read_map(reader)
            # Judged behind the reading: a connection that is closed with bytes unread loses its answer.
            check_peer(writer.get_extra_info("socket"))
            if request is not None:
                await self._answer(request, writer)
        except PostcopyError as error:
            log.warning("closed an admin connection: %s", error)
            write_map(writer, error_map(str(error), 2, None))
        except (OSError, TimeoutError) as error:
            log.warning("closed an admin connection: %s", str(error) or "no request in time")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        def tell(progress: dict[str, Any]) -> None:
            say(writer, {"progress": progress})

        living = asyncio.create_task(live(writer))
        try:
            command, arguments = judge(request)
            answer = {"result": await self._commands.get(command, unknown)(arguments, tell)}
        except PostcopyError as error:
            answer = error_map(str(error), error.exit_status, error.owner)
        except Exception as error:
            log.exception("internal error")
            answer = error_map(f"internal error: {error!r}", 1, None)
        finally:
            living.cancel()
        if not writer.is_closing():
            write_map(writer, answer)
            await writer.drain()


def say(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    """Send what may be missed."""
    if not writer.is_closing() and writer.transport.get_write_buffer_size() < ADMIN_UNREAD_BYTES_MAX:
        write_map(writer, value)


async def live(writer: asyncio.StreamWriter) -> None:
    """Say again and again that this daemon is there, until cancelled."""
    while True:
        await next_round(ADMIN_ALIVE_SECONDS)
        say(writer, {"alive": True})


def error_map(text: str, exit_status: int, owner: Owner | None) -> dict[str, Any]:
    """Build the answer that says what went wrong, the exit status that goes with it, and who owns the guest."""
    return {"error": {"text": text, "exit_status": exit_status, "owner": owner}}


async def unknown(_arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
    """Answer a command that this daemon does not have."""
    raise UsageError("this agent has no such command")


async def ask(
    address: UnixAddress, command: str, arguments: dict[str, Any] | None = None, tell: Tell | None = None
) -> dict[str, Any]:
    """Send one request to a daemon and return its result.

    Raises UsageError where nobody listens, RemoteError for what the daemon refuses or where it falls silent,
    MigrationLost where it vanishes in the middle of a migration.
    """
    heard = {"state": State.NONE.value}
    try:
        reader, writer = await asyncio.open_unix_connection(address.path)
    except OSError as error:
        raise UsageError(f"no agent answers at {address}: {error.strerror or error}") from error
    try:
        write_map(writer, {"command": command, "arguments": arguments or {}})
        await writer.drain()
        while (answer := await next_map(reader)) is not None:
            if "progress" in answer:
                heard = answer["progress"]
                if tell is not None:
                    tell(heard)
            elif "error" in answer:
                raise remote_error(answer["error"])
            elif "result" in answer:
                result: dict[str, Any] = answer["result"]
                return result
    except TimeoutError:
        raise await silence(address, heard) from None
    except (OSError, ProtocolError):
        pass  # it ended in the middle of something: the same as an end before the answer
    finally:
        writer.close()
    text = f"the agent at {address} ended before it answered"
    if command == "migrate":  # whoever sends a guest away holds pages of it: ending, it takes them along
        raise await without_source(text, heard)
    raise RemoteError(text, 1)


async def next_map(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """Return what a daemon says next, None at its end; TimeoutError where it says nothing."""
    reading = asyncio.create_task(read_map(reader))
    try:
        for _ in range(2):  # a process that was itself stopped for long has to look once before it complains
            if (await asyncio.wait({reading}, timeout=ADMIN_SILENCE_SECONDS / 2))[0]:
                return reading.result()
    finally:
        reading.cancel()
    raise TimeoutError


def remote_error(error: dict[str, Any]) -> RemoteError:
    """Build the error that a daemon's answer tells of."""
    return RemoteError(str(error["text"]), int(error["exit_status"]), error.get("owner"))


async def silence(address: UnixAddress, heard: dict[str, Any]) -> PostcopyError:
    """Build the error that says what the silence of a daemon means; `heard` is its latest progress."""
    if heard["state"] in SWITCHED:
        text = f"the source's agent at {address} does not answer any more, and pages of the running guest are there"
        return await without_source(text, heard)
    return RemoteError(f"the agent at {address} does not answer: nothing was heard for {ADMIN_SILENCE_SECONDS:g} s", 1)


async def without_source(text: str, heard: dict[str, Any]) -> PostcopyError:
    """Build the error that says what becomes of a guest whose source's agent is gone: it takes pages along, or not."""
    kept, stays = heard.get("kept"), False
    # A keeper that has nothing to keep ends with its agent; it is not asked, for whoever asks takes the agent's place.
    end = time.monotonic() + (0.0 if heard["state"] in SWITCHED else KEEPER_GONE_SECONDS)
    while kept is not None and (stays := Path(admin_address(kept).path).exists()) and time.monotonic() < end:
        await asyncio.sleep(KEEPER_LOOK_SECONDS)
    if not stays:
        return MigrationLost(text)
    return MigrationPaused(f"{text}; its pages are kept: postcopy source --resume {kept} goes on")
