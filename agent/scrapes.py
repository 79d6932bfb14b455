"""Answers scrapes over HTTP, in the event loop: a connection costs a descriptor and a task, and there are few of them.

Connections of anybody enter, the text of the metrics leaves. Who asks for nothing in time is closed, and where too many
wait at once it is the one that waits longest: however many say nothing, a Prometheus that comes and asks is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from postcopy.limits import SCRAPE_BACKLOG, SCRAPE_BYTES_MAX, SCRAPE_SECONDS, SCRAPERS_MAX
from postcopy.link.address import TcpAddress
from postcopy.link.listen import bind, connections

log = logging.getLogger("postcopy.metrics")

READ_BYTES = 4096

PATH = b"/metrics"
TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for, and whether more may follow on its connection."""

    method: bytes
    path: bytes
    keep_alive: bool


class Requests:
    """Makes requests of the bytes of one connection: `take` what comes, and `found` has those that are whole."""

    def __init__(self) -> None:
        self.found: list[Request] = []
        self._parser = HttpRequestParser(self)
        self._path = b""
        self._unfinished = 0

    def take(self, data: bytes) -> None:
        """Take bytes in; HttpParserError where they are no request, or one without end."""
        self._unfinished += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:  # the request is whole, and what would follow is no HTTP that is known here
            self.found[-1] = replace(self.found[-1], keep_alive=False)
        if self._unfinished > SCRAPE_BYTES_MAX:
            raise HttpParserError(f"a request of more than {SCRAPE_BYTES_MAX} bytes")

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._path = b""

    def on_url(self, url: bytes) -> None:
        """Take a piece of its target."""
        self._path += url

    def on_message_complete(self) -> None:
        """End it."""
        path = self._path.partition(b"?")[0]
        self.found.append(Request(self._parser.get_method(), path, self._parser.should_keep_alive()))
        self._unfinished = 0


class Scrapes:
    """One port where `text` is served; it is called in the event loop."""

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text
        self._accepting: asyncio.Task[None] | None = None
        self._waiting: dict[asyncio.Task[None], None] = {}  # whoever waits longest comes first

    def open(self, address: TcpAddress) -> str:
        """Serve from now on, up to close() or the end of the process; return where. UsageError: it cannot be had."""
        if not address.loopback:
            log.warning(
                "metrics: %s:%d is beyond this host: anybody who reaches it may read", address.host, address.port
            )
        listening = bind(address)
        listening.listen(SCRAPE_BACKLOG)
        self._accepting = asyncio.get_running_loop().create_task(self._accept(listening))
        bound = TcpAddress(address.host, listening.getsockname()[1])
        return f"http://{str(bound).removeprefix('tcp:')}{PATH.decode()}"

    async def close(self) -> None:
        """Serve no longer."""
        tasks = [*self._waiting, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, listening: socket.socket) -> None:
        with listening:
            async for connection in connections(listening):
                self._take(connection)

    def _take(self, connection: socket.socket) -> None:
        """Serve one more, and who waits longest no longer where these are too many."""
        task = asyncio.create_task(self._serve(connection))
        self._waiting[task] = None
        task.add_done_callback(lambda task: self._waiting.pop(task, None))
        if len(self._waiting) > SCRAPERS_MAX:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.cancel()

    async def _serve(self, connection: socket.socket) -> None:
        """Answer what comes on one connection, up to its end."""
        with connection, contextlib.suppress(OSError, TimeoutError):
            connection.setblocking(False)
            requests, goes_on = Requests(), True
            while goes_on:
                async with asyncio.timeout(SCRAPE_SECONDS):
                    goes_on = await self._exchange(connection, requests)
                self._wait_anew()

    def _wait_anew(self) -> None:
        """Go behind all others that wait."""
        task = asyncio.current_task()
        if task in self._waiting:
            del self._waiting[task]
            self._waiting[task] = None

    async def _exchange(self, connection: socket.socket, requests: Requests) -> bool:
        """Read until there are requests and answer them; return whether the connection goes on."""
        loop = asyncio.get_running_loop()
        while not requests.found:
            data = await loop.sock_recv(connection, READ_BYTES)
            if not data:
                return False
            try:
                requests.take(data)
            except HttpParserError:
                await loop.sock_sendall(connection, answer(HTTPStatus.BAD_REQUEST, "this is no HTTP\n"))
                return False
        request = requests.found.pop(0)
        status, text = self._told(request)
        await loop.sock_sendall(connection, answer(status, text, head=request.method == b"HEAD"))
        # A hundred requests fit into one packet, and a guest may stand still while they are answered: one is.
        return request.keep_alive and not requests.found

    def _told(self, request: Request) -> tuple[HTTPStatus, str]:
        if request.method not in {b"GET", b"HEAD"}:
            return HTTPStatus.METHOD_NOT_ALLOWED, "metrics are read by GET\n"
        if request.path != PATH:
            return HTTPStatus.NOT_FOUND, f"metrics are at {PATH.decode()}\n"
        try:
            text = self._text()
        except Exception:  # a mistake of ours: whoever asks hears of it, and the next one is answered again
            log.exception("internal error: the metrics cannot be told")
            return HTTPStatus.INTERNAL_SERVER_ERROR, "internal error: see the agent's log\n"
        return HTTPStatus.OK, text


def answer(status: HTTPStatus, text: str, *, head: bool = False) -> bytes:
    """Write an answer; with `head` that of a HEAD, which has no body."""
    body = text.encode()
    lines = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Date: {time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime())}",
        f"Content-Type: {TEXT}",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join((*lines, "", "")).encode() + (b"" if head else body)
