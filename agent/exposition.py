"""Metrics as the text that Prometheus reads, answered in the event loop.

prometheus_client's server has a thread and over a millisecond of CPU for each scrape, and on a small host that is taken
from the pump's threads; what never changes of a line is put together once here. Samples enter; answers to HTTP leave,
to one request a connection.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

log = logging.getLogger("postcopy.metrics")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# A client has so long to ask, and to take its answer.
REQUEST_SECONDS = 5.0
# Connections at a time: more than there are Prometheis.
CLIENTS_MAX = 16

Values = tuple[str, ...]
Samples = Mapping[Any, float]
"""By the values of their labels: Values of one length."""
Text = Callable[[], Iterable[str]]


def family(name: str, kind: str, text: str, samples: Samples, labels: Values = (), *, suffix: str = "") -> str:
    """Return the lines of one metric; `samples` by their labels' values, which are ours and need no escapes."""
    lines = "".join(f"{name}{suffix}{braces(labels, key)} {value}\n" for key, value in samples.items())
    return head(name, kind, text) + lines


@functools.lru_cache(maxsize=256)
def head(name: str, kind: str, text: str) -> str:
    """Return the lines before the samples."""
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


@functools.lru_cache(maxsize=1024)
def braces(labels: Values, values: Values) -> str:
    """Return what stands between a sample's name and its value."""
    pairs = ",".join(f'{label}="{value}"' for label, value in sorted(zip(labels, values, strict=True)))
    return f"{{{pairs}}}" if pairs else ""


class Exposition:
    """Answers clients with `text`."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._clients = 0

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        self._clients += 1
        try:
            if self._clients <= CLIENTS_MAX:
                async with asyncio.timeout(REQUEST_SECONDS):
                    writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                    await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError) as error:
            log.debug("closed a scrape: %r", error)
        finally:
            self._clients -= 1
            writer.close()

    def _answer(self, request: bytes) -> bytes:
        method, _, rest = request.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method != b"GET" or path not in {b"/", b"/metrics"}:
            return answer("404 Not Found", b"only GET /metrics is answered here\n")
        try:
            return answer("200 OK", "".join(self._text()).encode())
        except Exception:
            log.exception("internal error")
            return answer("500 Internal Server Error", b"internal error: the agent's log says more\n")


def answer(status: str, body: bytes) -> bytes:
    """Return a whole answer of HTTP."""
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
