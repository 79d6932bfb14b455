"""Whoever should not come in: strangers that are silent, slow or wrong, and OpenSSL's own client behind a preamble."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading

from postcopy.pump.tls import TlsSession
from postcopy.wire.preamble import Preamble, Role, Security, pack, psk_identity

from .fakes import connect

CONTROL = pack(Preamble(Role.CONTROL, 3, security=Security.TLS))


class Crowd:
    """Connections that are opened and kept: `count` of them, each having said `first`."""

    def __init__(self, address, count, first=b""):
        self.connections = []
        for _ in range(count):
            with contextlib.suppress(OSError):
                connection = connect(address)
                connection.sendall(first)
                self.connections.append(connection)

    def trickle(self, data):
        """One byte more on each that is still open: a slow-loris."""
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for connection in self.connections:
            connection.close()


def joins(address, role, migration_id, key, name=None):
    """Whether a data connection is accepted that has this key and says that it belongs to this migration."""
    with connect(address) as connection:
        connection.sendall(pack(Preamble(role, 3, migration_id, security=Security.TLS)))
        identity = name or psk_identity(role, migration_id)
        with TlsSession(connection.fileno(), listens=False, identity=identity, key=key) as session:
            connection.settimeout(None)  # with a time limit Python would have the socket not block
            try:
                return session.handshake() == "done" and session.receive(1) == b"\x06"
            except Exception:
                return False


def s_client(address, *arguments, preamble=CONTROL, deadline=20):
    """What `openssl s_client` says of a destination, and its status; the preamble is said for it on the way."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", *map(str, arguments)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, **pipes, text=True) as client:
            near, _ = listening.accept()
            with near, connect(address) as far:
                far.sendall(preamble)
                for one in (near, far):
                    one.settimeout(None)
                back = threading.Thread(target=_pipe, args=(far, near), daemon=True)
                back.start()
                _pipe(near, far)
                back.join(deadline)
            out, _ = client.communicate(timeout=deadline)
            return client.returncode, out


def _pipe(one, other):
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)
