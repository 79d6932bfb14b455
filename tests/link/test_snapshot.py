"""A snapshot's source against strangers who would have it serve more than it has room for."""

import asyncio

import pytest

from postcopy.errors import LinkError
from postcopy.limits import TOKEN_BYTES
from postcopy.link import snapshot
from postcopy.link.dial import dial_data, dial_fetch
from postcopy.link.snapshot import Snapshot
from postcopy.wire.control import Cancel, Hello, LayoutOffer, Ready, State, Welcome
from postcopy.wire.identity import id_of
from postcopy.wire.messages import Piece
from postcopy.wire.preamble import Preamble, Role
from postcopy.wire.version import VERSION

LARGE = 64 << 20


class Stranger:
    """Fetches a file of two large pages, whose pages are as large as he says."""

    def __init__(self, number, page_size):
        token = bytes([number]) * TOKEN_BYTES
        self.identity = id_of(token), token
        self.pieces = (Piece(0, 2 * LARGE, page_size),)

    async def fetch(self, address):
        """Return what the source says once it has been told that all is ready."""
        self.channel = await dial_fetch(address)
        assert isinstance(await self.channel.receive(), Hello)
        self.channel.send(Welcome(VERSION, *self.identity, "a stranger", self.pieces))
        assert isinstance(await self.channel.receive(), LayoutOffer)
        self.channel.send(Ready())
        self.data = []
        for role in (Role.URGENT, Role.PUSH):
            try:
                self.data.append(await dial_data(address, Preamble(role, VERSION, *self.identity)))
            except LinkError:
                break
        return await self.channel.receive()

    def go(self):
        self.channel.abort()
        for one in self.data:
            one.close()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "memory.snap"
    with path.open("wb") as file:
        file.truncate(2 * LARGE)
    return path


def test_page_sizes_that_strangers_name_take_no_more_memory_than_there_is_for_all(file, monkeypatch):
    monkeypatch.setattr(snapshot, "FETCHED_BYTES_MAX", 4 * LARGE + (8 << 20))

    async def story():
        async with Snapshot(file, "tcp:127.0.0.1:0") as here:
            large = [Stranger(number, LARGE) for number in (1, 2, 3)]
            answers = [await one.fetch(here.address) for one in large]
            assert [type(one) for one in answers] == [State, State, Cancel], answers
            assert answers[2].text == (
                "128 MiB of buffers are asked for, and others have 256 MiB of the 264 MiB that this source gives to "
                "all together"
            )
            small = Stranger(4, 4096)
            assert isinstance(await small.fetch(here.address), State)
            large[0].go()
            while len(here.current) > 2:
                await asyncio.sleep(0.001)
            again = Stranger(5, LARGE)
            assert isinstance(await again.fetch(here.address), State)
            for one in (*large[1:], small, again):
                one.go()

    asyncio.run(asyncio.wait_for(story(), 30))
