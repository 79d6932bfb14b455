"""The listener and the control channel, on both event loops, in this process: nothing here can wait in a page fault."""

import asyncio
import logging
import socket

import pytest

from postcopy.errors import LinkError, ProtocolError, UsageError
from postcopy.limits import PUSH_SEND_BYTES
from postcopy.link import listen
from postcopy.link.address import TcpAddress, UnixAddress
from postcopy.link.control import ControlChannel
from postcopy.link.dial import dial_control, dial_data
from postcopy.link.listen import Listener
from postcopy.link.sockets import tune
from postcopy.wire.control import Hello, Ready, Run, encode
from postcopy.wire.preamble import ACCEPTED, Preamble, Role, pack

DATA = Preamble(Role.PUSH, 3, b"i" * 16, b"t" * 32)


@pytest.fixture(params=["tcp", "tcp6", "unix"])
def address(request, tmp_path):
    where = {
        "tcp": TcpAddress("127.0.0.1", 0),
        "tcp6": TcpAddress("::1", 0),
        "unix": UnixAddress(str(tmp_path / "s")),
    }
    return where[request.param]


async def nobody(channel):
    raise AssertionError(channel.name)


async def no_data(preamble, connection):
    raise ProtocolError("no data is wanted")


def test_a_control_connection_from_end_to_end(play, address):
    async def story():
        accepted = asyncio.Queue()

        async def on_control(channel):
            await accepted.put(channel)

        listener = Listener(address, on_control, no_data)
        await listener.open()
        near = await dial_control(listener.address)
        far = await accepted.get()
        near.send(Hello((2, 3), "near"))
        near.send(Ready())
        assert await far.receive() == Hello((2, 3), "near")
        assert await far.receive() == Ready()
        far.send(Run())
        await far.close()
        assert await near.receive() == Run()
        with pytest.raises(LinkError, match="closed the connection"):
            await near.receive()
        with pytest.raises(LinkError, match="is closed"):
            near.send(Run())
        await near.close()
        await listener.close()

    play(story)


def test_a_mistake_of_ours_closes_the_connection_and_is_told(play, address, caplog):
    async def story():
        async def broken(_channel):
            raise ZeroDivisionError

        listener = Listener(address, broken, no_data)
        await listener.open()
        near = await dial_control(listener.address)
        with pytest.raises(LinkError):
            await near.receive()
        await near.close()
        await listener.close()

    with caplog.at_level(logging.ERROR):
        play(story)
    assert "internal error" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_what_is_known_to_be_gone_is_not_sent(play):
    async def story():
        near, far = socket.socketpair()
        channel = await ControlChannel.over(near, "far")
        far.close()
        with pytest.raises(LinkError):
            await channel.receive()
        with pytest.raises(LinkError, match="the connection to far is closed"):
            channel.send(Run())
        channel.abort()

    play(story)


def test_a_control_connection_that_ends_inside_a_message(play):
    async def story():
        near, far = socket.socketpair()
        channel = await ControlChannel.over(near, "far")
        far.sendall(encode(Ready())[:-1])
        far.close()
        with pytest.raises(ProtocolError, match="ended inside a control message"):
            await channel.receive()
        channel.abort()

    play(story)


def test_a_data_connection_is_the_callers_once_accepted(play, address):
    async def story():
        kept = []

        async def on_data(preamble, connection):
            assert preamble == DATA
            connection.send(ACCEPTED)
            kept.append(connection)

        listener = Listener(address, nobody, on_data)
        await listener.open()
        near = socket.socket(fileno=(await dial_data(listener.address, DATA)).fd)
        near.setblocking(True)
        near.sendall(b"pages")
        loop = asyncio.get_running_loop()
        assert await loop.sock_recv(kept[0], 5) == b"pages"  # not a byte was lost behind the preamble
        near.close()
        kept[0].close()
        await listener.close()

    play(story)


def test_a_data_connection_that_is_refused(play, caplog):
    async def story():
        listener = Listener(TcpAddress("127.0.0.1", 0), nobody, no_data)
        await listener.open()
        with pytest.raises(LinkError, match=r"did not accept the push connection|Connection reset"):
            await dial_data(listener.address, DATA)
        await listener.close()

    with caplog.at_level(logging.WARNING):
        play(story)
    (line,) = caplog.messages
    assert line.startswith("closed 127.0.0.1:")
    assert line.endswith(": no data is wanted")


def test_silence_and_crowds(play, caplog, monkeypatch):
    monkeypatch.setattr(listen, "PREAMBLE_SECONDS", 0.2)
    monkeypatch.setattr(listen, "UNPROVEN_MAX", 2)

    async def story():
        listener = Listener(TcpAddress("127.0.0.1", 0), nobody, no_data)
        await listener.open()
        loop = asyncio.get_running_loop()
        connections = []
        for _ in range(3):
            connection = socket.socket()
            connection.setblocking(False)
            await loop.sock_connect(connection, (listener.address.host, listener.address.port))
            connections.append(connection)
        for connection in connections:
            assert await loop.sock_recv(connection, 1) == b""
            connection.close()
        await listener.close()

    with caplog.at_level(logging.WARNING):
        play(story)
    reasons = sorted(line.partition(": ")[2] for line in caplog.messages)
    assert reasons == ["2 younger connections have not proved themselves either", *["no preamble within 0.2 s"] * 2]


def test_a_trickled_preamble_is_read_and_a_wrong_one_is_not_waited_for(play, caplog):
    async def story():
        arrived = asyncio.Event()

        async def on_data(preamble, connection):
            arrived.set()
            connection.close()

        listener = Listener(TcpAddress("127.0.0.1", 0), nobody, on_data)
        await listener.open()
        reader, writer = await asyncio.open_connection(listener.address.host, listener.address.port)
        for byte in pack(DATA):
            writer.write(bytes([byte]))
            await writer.drain()
        await arrived.wait()
        writer.close()
        reader, writer = await asyncio.open_connection(listener.address.host, listener.address.port)
        writer.write(b"SSH-")
        assert await reader.read() == b""
        writer.close()
        await listener.close()

    with caplog.at_level(logging.WARNING):
        play(story)
    (line,) = caplog.messages
    assert "not a postcopy connection: it begins with 'SSH-'" in line


def test_addresses_that_cannot_be_had(play, tmp_path):
    async def story():
        first = Listener(TcpAddress("127.0.0.1", 0), nobody, no_data)
        await first.open()
        with pytest.raises(UsageError, match=f"cannot listen on {first.address}: Address already in use"):
            await Listener(first.address, nobody, no_data).open()
        await first.close()
        with pytest.raises(UsageError, match="No such file or directory"):
            await Listener(UnixAddress(str(tmp_path / "no" / "folder")), nobody, no_data).open()
        (tmp_path / "precious").write_text("not a socket")
        with pytest.raises(UsageError, match="Address already in use"):
            await Listener(UnixAddress(str(tmp_path / "precious")), nobody, no_data).open()
        assert (tmp_path / "precious").read_text() == "not a socket"

    play(story)


def test_sockets_are_tuned():
    with socket.socket() as connection:
        tune(connection, Role.PUSH)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 8000
        # the kernel doubles what it is given, for its own books
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * PUSH_SEND_BYTES
