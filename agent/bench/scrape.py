"""Reading the daemons' metrics: once, to compare with the report, and again and again, to see what that costs.

Addresses enter; figures leave. What is read again and again is not looked at: a Prometheus lives on a host of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

REQUEST = b"GET /metrics HTTP/1.0\r\nHost: agent\r\n\r\n"
REQUEST_AGAIN = b"GET /metrics HTTP/1.1\r\nHost: agent\r\n\r\n"
ANSWER_SECONDS = 5.0

HostPort = tuple[str, int]


def metrics_address(log: str) -> HostPort | None:
    """Return where a daemon that wrote this log serves its metrics, None where it does not."""
    found = re.search(r"http://(\S+):(\d+)/metrics", log)
    return (found[1], int(found[2])) if found else None


async def read(address: HostPort) -> bytes:
    """Return what is answered, header and all."""
    async with asyncio.timeout(ANSWER_SECONDS), connected(address) as (reader, writer):
        writer.write(REQUEST)
        return await reader.read()


async def again(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read once on a connection that is kept, as a Prometheus keeps its own."""
    async with asyncio.timeout(ANSWER_SECONDS):
        writer.write(REQUEST_AGAIN)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        await reader.readexactly(int(length[1]) if length else 0)


@asynccontextmanager
async def connected(address: HostPort) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Have a connection while the block runs."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield reader, writer
    finally:
        writer.close()


async def scrape(address: HostPort | None) -> dict[str, float]:
    """Return the metrics there; nothing where nobody answers."""
    if address is None:
        return {}
    try:
        answer = await read(address)
    except (OSError, TimeoutError):
        return {}
    return parse_metrics(answer.partition(b"\r\n\r\n")[2].decode())


def parse_metrics(text: str) -> dict[str, float]:
    """Return each metric of the exposition format summed over its labels, buckets left out."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#") and "_bucket{" not in line:
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


@asynccontextmanager
async def scraping(addresses: Sequence[HostPort | None], per_second: int) -> AsyncIterator[None]:
    """Read the metrics of all addresses so often while the block runs."""

    async def repeat(address: HostPort) -> None:
        while True:
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                async with connected(address) as (reader, writer):
                    while True:
                        await again(reader, writer)
                        await asyncio.sleep(1 / per_second)
            await asyncio.sleep(1 / per_second)

    readers = [asyncio.create_task(repeat(one)) for one in addresses if one is not None]
    try:
        yield
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
