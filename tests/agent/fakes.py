"""An agent that misbehaves on purpose: the wire spoken by hand over blocking sockets."""

from __future__ import annotations

import socket
import time

from postcopy.link.tls import Credentials
from postcopy.wire.control import (
    ControlDecoder,
    GuestOffer,
    Hello,
    LayoutOffer,
    Ready,
    Refuse,
    RegionOffer,
    Welcome,
    encode,
)
from postcopy.wire.preamble import ACCEPTED, Preamble, Role, Security, pack, unpack
from postcopy.wire.version import VERSION, VERSION_MIN

SECONDS = 15
OFFER = LayoutOffer((RegionOffer("shmem", 4096, 1 << 20),), GuestOffer("emulated", 1))


class Channel:
    """One control connection, spoken by hand."""

    def __init__(self, connection):
        self.socket = connection
        self.socket.settimeout(SECONDS)
        self._decoder = ControlDecoder()
        self._messages = []

    def send(self, message):
        self.socket.sendall(encode(message))

    def receive(self):
        """The next message, None at the end of the connection."""
        while not self._messages:
            data = self.socket.recv(65536)
            if not data:
                return None
            self._messages += self._decoder.feed(data)
        return self._messages.pop(0)

    def speak(self, version):
        """Read messages as they are in this version."""
        self._decoder.version = version

    def expect(self, shape):
        message = self.receive()
        assert isinstance(message, shape), message
        return message

    def close(self):
        self.socket.close()


def host_port(address):
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    return host, int(port)


def connect(address):
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(SECONDS)
        connection.connect(address.removeprefix("unix:"))
        return connection
    return socket.create_connection(host_port(address), timeout=SECONDS)


def ends(connection):
    """Whether the other end closes the connection, having said nothing."""
    connection.settimeout(SECONDS)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


class FakeSource:
    """Goes as far towards a migration as it is told."""

    def __init__(self, address, tls=None):
        self.address = address
        self.tls = tls  # a directory of certificates
        self.data = {}
        self._connect()

    def _connect(self):
        connection = connect(self.address)
        if self.tls is None:
            connection.sendall(pack(Preamble(Role.CONTROL)))
        else:
            connection.sendall(pack(Preamble(Role.CONTROL, VERSION, security=Security.TLS)))
            context = Credentials(self.tls).for_dialling()
            connection = context.wrap_socket(connection, server_hostname=host_port(self.address)[0])
        self.control = Channel(connection)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for connection in [self.control.socket, *self.data.values()]:
            connection.close()

    def greet(self, versions=(VERSION_MIN, VERSION)):
        """Get in, also where the destination is still cleaning up behind the one before."""
        end = time.monotonic() + SECONDS
        while True:
            self.control.send(Hello(versions, "a fake"))
            self.control.speak(min(versions[1], VERSION))
            answer = self.control.receive()
            if not isinstance(answer, Refuse) or answer.code != "busy" or time.monotonic() > end:
                break
            self.control.close()
            time.sleep(0.2)  # between two looks; each is a line in the log, of which strangers have only so many
            self._connect()
        assert isinstance(answer, Welcome), answer
        self.welcome = answer
        return self

    def offer(self, offer=OFFER):
        self.control.send(offer)
        self.control.expect(Ready)
        return self

    def attach(self, *roles):
        for role in roles or (Role.URGENT, Role.PUSH):
            self.data[role] = self.dial(role, self.welcome.migration_id, self.welcome.token)
            assert self.data[role].recv(1) == ACCEPTED
        return self

    def dial(self, role, migration_id, token):
        connection = connect(self.address)
        connection.sendall(pack(Preamble(role, VERSION, migration_id, token)))
        return connection


class FakeDestination:
    """Listens, and answers as it is told."""

    def __init__(self):
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(SECONDS)
        self.address = f"tcp:127.0.0.1:{self._listening.getsockname()[1]}"
        self.control = None
        self.data = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listening.close()
        for connection in [*([self.control.socket] if self.control else []), *self.data.values()]:
            connection.close()

    def accept(self):
        """Take one connection and its preamble; return what it says and the socket."""
        connection, _ = self._listening.accept()
        connection.settimeout(SECONDS)
        data = b""
        while len(data) < 64:
            data += connection.recv(64 - len(data))
        return unpack(data), connection

    def upto_hello(self):
        preamble, connection = self.accept()
        assert preamble.role is Role.CONTROL
        self.control = Channel(connection)
        self.control.expect(Hello)
        return self

    def upto_offer(self, token=b"t" * 32):
        self.upto_hello()
        self.control.send(Welcome(VERSION, b"i" * 16, token, "a fake"))
        self.offered = self.control.expect(LayoutOffer)
        return self

    def upto_attached(self):
        self.upto_offer()
        self.control.send(Ready())
        for role in (Role.URGENT, Role.PUSH):
            preamble, connection = self.accept()
            assert (preamble.role, preamble.token) == (role, b"t" * 32)
            self.data[role] = connection
            connection.sendall(ACCEPTED)
        return self
