"""A TCP proxy between two agents that does what networks do: it cuts, swallows, delays and spoils.

It stands in a thread of its own. Each connection is known by the role in its preamble. Faults are set by the test from
outside: what is set for a role holds for connections of it that are there and that come.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

from postcopy.wire.preamble import PREAMBLE_BYTES, Role, unpack

CHUNK = 65536


class Link:
    """One connection through the proxy: bytes both ways, counted from the destination's preamble on."""

    def __init__(self, near, far, role):
        self.near, self.far, self.role = near, far, role
        self.forwarded = 0
        self.silent = False

    def close(self):
        for end in (self.near, self.far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Proxy:
    """Listens where the source dials, and forwards to `upstream` (host, port).

    `budget[role]`: so many bytes more in either direction, then the connection is cut, once. `refuses`: whoever
    comes is closed at once. `deaf`: whoever comes is let in and nothing of it is forwarded. `spoil[role]`: the byte
    that many bytes ahead on the way to the destination is changed, once.
    """

    def __init__(self, upstream, host="127.0.0.1"):
        self._upstream = upstream
        self._listening = socket.create_server((host, 0), backlog=64)
        self.address = f"tcp:{host}:{self._listening.getsockname()[1]}"
        self.lock = threading.Lock()
        self.links = []
        self.budget = {}
        self.spoil = {}
        self.refuses = self.deaf = False
        self.accepted = 0
        self.cuts = 0
        self._ending = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._ending = True
        self._thread.join(10)
        self._listening.close()
        for link in self.links:
            link.close()

    # --- what the test does ---------------------------------------------------------------------------------------

    def cut(self, *roles):
        """Cut the connections of these roles, all if none is named."""
        with self.lock:
            for link in [link for link in self.links if not roles or link.role in roles]:
                self._drop(link)

    def swallow(self):
        """Forward nothing more of what is connected, and close nothing: a link that was taken down."""
        with self.lock:
            for link in self.links:
                link.silent = True

    def roles(self):
        with self.lock:
            return sorted(link.role.name for link in self.links if not link.silent)

    # --- its thread -----------------------------------------------------------------------------------------------

    def _drop(self, link):
        link.close()
        self.links.remove(link)
        self.cuts += 1

    def _run(self):
        while not self._ending:
            with self.lock:
                ends = {end: (link, end) for link in self.links if not link.silent for end in (link.near, link.far)}
            ready, _, _ = select.select([self._listening, *ends], [], [], 0.01)
            with self.lock:
                for end in ready:
                    if end is self._listening:
                        self._accept()
                    elif ends[end][0] in self.links and not ends[end][0].silent:
                        self._forward(ends[end][0], end)

    def _accept(self):
        near, _ = self._listening.accept()
        self.accepted += 1
        if self.refuses:
            near.close()
            return
        near.settimeout(5)
        preamble = b""
        while len(preamble) < PREAMBLE_BYTES:
            piece = near.recv(PREAMBLE_BYTES - len(preamble))
            if not piece:
                near.close()
                return
            preamble += piece
        try:
            far = socket.create_connection(self._upstream, timeout=5)
        except OSError:
            near.close()
            return
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(near, far, unpack(preamble).role)
        link.silent = self.deaf
        if not self.deaf:
            far.sendall(preamble)
        self.links.append(link)

    def _forward(self, link, end):
        other = link.far if end is link.near else link.near
        budget = self.budget.get(link.role)
        try:
            data = end.recv(CHUNK if budget is None else max(1, min(CHUNK, budget)))
            if not data:
                self._drop(link)
                return
            data = self._spoiled(link, data) if end is link.near else data
            other.settimeout(10)
            other.sendall(data)
        except OSError:
            self._drop(link)
            return
        if budget is not None:
            self.budget[link.role] = budget - len(data)
            if self.budget[link.role] <= 0:
                del self.budget[link.role]
                self._drop(link)

    def _spoiled(self, link, data):
        at = self.spoil.get(link.role)
        if at is None:
            return data
        if at >= len(data):
            self.spoil[link.role] = at - len(data)
            return data
        del self.spoil[link.role]
        return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def upstream_of(address):
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    return host, int(port)


def wait_for(condition, what, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


CONTROL, URGENT, PUSH = Role.CONTROL, Role.URGENT, Role.PUSH
