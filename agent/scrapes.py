"""Answers scrapes over HTTP, in the event loop: a connection costs a descriptor, and there are few of them.

Connections of anybody enter, the text of the metrics leaves. Who asks for nothing in time is closed, and where too many
wait at once it is the one that waits longest: however many say nothing, a Prometheus that comes and asks is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from http import HTTPStatus
from typing import cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from postcopy.limits import SCRAPE_BACKLOG, SCRAPE_BYTES_MAX, SCRAPE_SECONDS, SCRAPERS_MAX
from postcopy.link.address import TcpAddress
from postcopy.link.listen import bind, connections
from postcopy.link.rounds import ROUND_SECONDS, next_round

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

    def take(self, data: bytes | memoryview) -> None:
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
        self._waiting: dict[asyncio.Task[None], float] = {}  # and since when; whoever waits longest comes first
        self._timer: asyncio.TimerHandle | None = None

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
        ending = [*self._waiting, *([] if self._accepting is None else [self._accepting])]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listening:
            async for connection in connections(listening):
                serving = loop.create_task(self._serve(connection))
                serving.add_done_callback(partial(self._end, connection))
                self._wait_anew(serving)
                if len(self._waiting) > SCRAPERS_MAX:
                    self._give_up(next(iter(self._waiting)))

    def _wait_anew(self, serving: asyncio.Task[None]) -> None:
        """Put one behind all others that wait."""
        self._waiting.pop(serving, None)
        self._waiting[serving] = time.monotonic()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SCRAPE_SECONDS, self._look)

    def _end(self, connection: socket.socket, serving: asyncio.Task[None]) -> None:
        connection.close()
        self._waiting.pop(serving, None)
        if not serving.cancelled() and (error := serving.exception()) is not None:
            log.error("internal error: a connection for metrics was closed", exc_info=error)

    def _give_up(self, serving: asyncio.Task[None]) -> None:
        del self._waiting[serving]  # not once it has ended: until then it would be the next one to go, too
        serving.cancel()

    def _look(self) -> None:
        """Close who has waited too long, and look again when the next one may have: nobody has a timer of his own."""
        self._timer = None
        now = time.monotonic()
        for serving, since in [*self._waiting.items()]:
            if now < since + SCRAPE_SECONDS:
                left = since + SCRAPE_SECONDS - now
                self._timer = asyncio.get_running_loop().call_later(left, self._look)
                break
            self._give_up(serving)

    async def _serve(self, connection: socket.socket) -> None:
        """Answer what is asked on one connection, request by request, until it ends or is cancelled.

        Who asks twice within two rounds is answered in rounds from then on, when this loop is awake anyway, and once
        in each. Whoever asks less often is answered at once.
        """
        requests, buffer = Requests(), memoryview(bytearray(READ_BYTES))
        serving = cast("asyncio.Task[None]", asyncio.current_task())
        loop = asyncio.get_running_loop()
        answered_at = -math.inf
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while taken := await receive(connection, buffer):
                try:
                    requests.take(buffer[:taken])
                except HttpParserError:
                    await loop.sock_sendall(connection, answer(HTTPStatus.BAD_REQUEST, "this is no HTTP\n", last=True))
                    return
                if not requests.found:
                    continue
                request = requests.found.pop(0)
                # A hundred requests fit into one packet, and a guest may stand still while they are answered: one is.
                last = not request.keep_alive or bool(requests.found)
                self._wait_anew(serving)
                await loop.sock_sendall(connection, self.told(request, last=last))
                if last:
                    return
                before, answered_at = answered_at, loop.time()
                if answered_at - before < 2 * ROUND_SECONDS:
                    await next_round()

    def told(self, request: Request, *, last: bool) -> bytes:
        """Answer a request; `last`: no other is answered behind it."""
        status, text = self._told(request)
        return answer(status, text, head=request.method == b"HEAD", last=last)

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


async def receive(connection: socket.socket, buffer: memoryview) -> int:
    """Receive what is there already, or what comes next: how many bytes, 0 at the end."""
    with contextlib.suppress(BlockingIOError):
        return connection.recv_into(buffer)
    return await asyncio.get_running_loop().sock_recv_into(connection, buffer)


def answer(status: HTTPStatus, text: str, *, head: bool = False, last: bool = False) -> bytes:
    """Write an answer; with `head` that of a HEAD, which has no body; `last` on its connection it says so."""
    body = text.encode()
    ending = _LAST if last else b""
    start = _HEAD % (status.value, status.phrase.encode(), _date(int(time.time())), len(body), ending)
    return start if head else start + body


_HEAD = f"HTTP/1.1 %d %b\r\nDate: %b\r\nContent-Type: {TEXT}\r\nContent-Length: %d\r\n%b\r\n".encode()
_LAST = b"Connection: close\r\n"


@lru_cache(maxsize=1)
def _date(now: int) -> bytes:
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now)).encode()
