"""Answers scrapes over HTTP, in the event loop: a connection costs a descriptor, and there are few of them.

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
from functools import lru_cache
from http import HTTPStatus
from typing import cast

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
        self._waiting: dict[_Scraper, float] = {}  # and since when; whoever waits longest comes first
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
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        for scraper in [*self._waiting]:
            scraper.abort()
        if self._timer is not None:
            self._timer.cancel()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listening:
            async for connection in connections(listening):
                with contextlib.suppress(OSError):  # it is gone already
                    await loop.connect_accepted_socket(lambda: _Scraper(self), connection)

    def begin(self, scraper: _Scraper) -> None:
        """Let one more wait, and who waits longest no longer where these are too many."""
        self.wait_anew(scraper)
        if len(self._waiting) > SCRAPERS_MAX:
            next(iter(self._waiting)).abort()

    def wait_anew(self, scraper: _Scraper) -> None:
        """Put one behind all others that wait."""
        self._waiting.pop(scraper, None)
        self._waiting[scraper] = time.monotonic()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SCRAPE_SECONDS, self._look)

    def end(self, scraper: _Scraper) -> None:
        """Let one wait no longer."""
        self._waiting.pop(scraper, None)

    def _look(self) -> None:
        """Close who has waited too long, and look again when the next one may have: nobody has a timer of his own."""
        self._timer = None
        now = time.monotonic()
        for scraper, since in [*self._waiting.items()]:
            if now < since + SCRAPE_SECONDS:
                left = since + SCRAPE_SECONDS - now
                self._timer = asyncio.get_running_loop().call_later(left, self._look)
                break
            scraper.abort()

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


class _Scraper(asyncio.BufferedProtocol):
    """One connection: what it asks for is answered where its bytes come in, without a task that has to be woken."""

    _transport: asyncio.Transport

    def __init__(self, scrapes: Scrapes) -> None:
        self._scrapes = scrapes
        self._requests = Requests()
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._reads = True  # what was answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for what it asks."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(0)  # whoever reads slowly has one answer here, and asks for no more
        self._scrapes.begin(self)

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Return where bytes may go: no more at a time than are looked at in one go."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Answer the request that is whole with these bytes, if there is one."""
        requests = self._requests
        try:
            requests.take(self._buffer[:nbytes])
        except HttpParserError:
            self._transport.write(answer(HTTPStatus.BAD_REQUEST, "this is no HTTP\n", last=True))
            self._transport.close()
            return
        if not requests.found:
            return
        request = requests.found.pop(0)
        # A hundred requests fit into one packet, and a guest may stand still while they are answered: one is.
        last = not request.keep_alive or bool(requests.found)
        self._transport.write(self._scrapes.told(request, last=last))
        if last:
            self._transport.close()
        elif self._reads:
            self._scrapes.wait_anew(self)

    def pause_writing(self) -> None:
        """Ask for nothing until the answer has left."""
        self._reads = False
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Wait for the next request."""
        self._reads = True
        self._transport.resume_reading()
        self._scrapes.wait_anew(self)

    def connection_lost(self, _error: Exception | None) -> None:
        """Wait no longer."""
        self._scrapes.end(self)

    def abort(self) -> None:
        """Close it at once, whatever has not left."""
        self._scrapes.end(self)
        self._transport.abort()


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
