"""A TCP proxy between two agents that does what networks do: it delays, narrows, cuts, swallows, loses and spoils.

It stands in a thread of its own, in a network namespace if one is named. Each connection is known by the role in its
preamble. Faults are set by the test from outside: what is set for a role holds for connections of it that are there and
that come. One that watches also knows the messages on plain control connections, and keeps one back until it is let go:
what is forced so is an order.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from pathlib import Path

from postcopy.errors import ProtocolError
from postcopy.wire.control import ControlDecoder
from postcopy.wire.messages import MESSAGES
from postcopy.wire.preamble import PREAMBLE_BYTES, Role, unpack

from .opened import Opened

CHUNK = 65536
QUEUE_BYTES = 256 << 10  # read ahead of what may be written: a long link holds no more
LOOK_SECONDS = 0.01
CLONE_NEWNET = 0x40000000
CONTROL, URGENT, PUSH = Role.CONTROL, Role.URGENT, Role.PUSH
NAMES = {shape: name for name, shape in MESSAGES.items()}


class Pipe:
    """One direction of a connection: what was read and is not written yet, as (when it may go, its name, bytes)."""

    def __init__(self, near, far, *, forward):
        self.near, self.far, self.forward = near, far, forward
        self.queue = deque()
        self.waiting = 0
        self.free_at = 0.0  # when the link has carried all that waits
        self.ended = False
        self.held = False
        self.decoder = ControlDecoder()
        self.part = b""

    def messages(self, data):
        """Cut what came into (name, bytes) of whole messages; the rest waits for more."""
        self.part += data
        while len(self.part) >= 4 and len(self.part) >= (size := 4 + struct.unpack_from("<I", self.part)[0]):
            whole, self.part = self.part[:size], self.part[size:]
            (message,) = self.decoder.feed(whole)
            yield NAMES[type(message)], whole


class Link:
    """One connection through the proxy. `role` is None until its preamble is there."""

    def __init__(self, near, far):
        self.near, self.far = near, far
        self.role = None
        self.preamble = b""
        self.silent = False  # nothing is read any more
        self.lossy = False  # all that is read is dropped
        self.doomed = False  # it is cut when what waits has gone
        self.opened = None  # its TLS, where that is looked into
        self.unsealed = []  # messages for a destination that is not ready to hear them
        self.pipes = (Pipe(near, far, forward=True), Pipe(far, near, forward=False))

    def close(self, *, reset=False):
        for end in (self.near, self.far):
            with contextlib.suppress(OSError):
                if reset:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    end.shutdown(socket.SHUT_RDWR)
            end.close()


class Proxy:
    """Listens where the source dials, and forwards to `upstream` (host, port).

    `budget[role]`: so many bytes more in either direction, then the connection is cut, once. `spoil[role]`: the byte
    that many bytes ahead is changed, once, on the way to the destination; `spoil_back[role]` on the way to the source.
    `delay[role]`: seconds that each byte takes longer, `rate[role]`: bytes a second, either way. `refuses`: whoever
    comes is closed at once. `deaf`: whoever comes is let in and nothing of it is forwarded. `opens`: Credentials of
    both ends, for one that watches encrypted control connections.
    """

    def __init__(self, upstream, host="127.0.0.1", *, namespace=None, watches=False, opens=None):
        self._upstream = upstream
        self._host, self._namespace, self._watches, self._opens = host, namespace, watches, opens
        self.lock = threading.Lock()
        self.links = []
        self._thread = None
        self.calm()
        self.accepted = self.cuts = self.spoilt = 0
        self._held, self._reached = None, threading.Event()
        self._ending = False
        self._listens = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._listens.wait(10)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._ending = True
        self._thread.join(10)
        self._listening.close()
        for link in self.links:
            link.close()

    # --- what the test does ---------------------------------------------------------------------------------------

    def calm(self):
        """Do nothing to what comes from now on."""
        assert self._thread is None or self._thread.is_alive(), "the proxy has failed"
        self.refuses = self.deaf = False
        self.budget, self.spoil, self.spoil_back = {}, {}, {}
        self.delay, self.rate = defaultdict(float), {}

    def cut(self, *roles, reset=False):
        """Cut the connections of these roles, all if none is named."""
        with self.lock:
            for link in [link for link in self.links if not roles or link.role in roles]:
                self._drop(link, reset=reset)

    def swallow(self, *roles, lose=False):
        """Forward nothing more of these roles' connections, or all, and close none: a link that was taken down.

        What is sent waits unread at this end; or it is taken and lost.
        """
        with self.lock:
            for link in self.links:
                if not roles or link.role in roles:
                    link.silent, link.lossy = not lose, lose

    def wake(self):
        """Forward again what was left unread."""
        with self.lock:
            for link in self.links:
                link.silent = False

    def admit(self):
        """Let in and hear whoever comes, and who was let in and not heard."""
        self.refuses = self.deaf = False
        self.wake()

    def hold(self, name):
        """Keep the next message of this name back, or the next connection of a role by its name."""
        with self.lock:
            self._reached.clear()
            self._held = name

    def wait_held(self):
        """Return when what is to be held is."""
        assert self._reached.wait(20), f"{self._held} never came"

    def wait_passed(self):
        """Return when nothing waits here: all that was let go is with those whom it is for."""
        wait_for(lambda: not any(pipe.queue for link in list(self.links) for pipe in link.pipes), "it does not pass")

    def release(self):
        """Let go what is held."""
        with self.lock:
            self._held = None
            for link in self.links:
                for pipe in link.pipes:
                    pipe.held = False

    def roles(self):
        with self.lock:
            return sorted(link.role.name for link in self.links if link.role is not None and not link.silent)

    # --- its thread -----------------------------------------------------------------------------------------------

    def _drop(self, link, *, reset=False):
        link.close(reset=reset)
        self.links.remove(link)
        self.cuts += 1

    def _run(self):
        if self._namespace is not None:
            enter_namespace(self._namespace)
        self._listening = socket.create_server((self._host, 0), backlog=64)
        self.address = f"tcp:{self._host}:{self._listening.getsockname()[1]}"
        self._listens.set()
        while not self._ending:
            with self.lock:
                reading, writing, soon = self._interests(time.monotonic())
            try:
                readable, writable, _ = select.select([self._listening, *reading], list(writing), [], soon)
            except (OSError, ValueError):  # cut by the test at this very moment
                continue
            with self.lock:
                if self._listening in readable:
                    self._accept()
                for end in readable:
                    if end in reading and reading[end][0] in self.links:
                        self._read(*reading[end])
                for end in writable:
                    if writing[end][0] in self.links:
                        self._write(*writing[end], time.monotonic())

    def _interests(self, now):
        """Return the ends to read from and to write to, with their link and pipe, and how long nothing else is due."""
        reading, writing, soon = {}, {}, LOOK_SECONDS
        for link in list(self.links):
            if link.doomed and not any(pipe.queue for pipe in link.pipes):
                self._drop(link)
                continue
            for pipe in link.pipes:
                if not (link.silent or link.doomed or pipe.ended) and pipe.waiting < QUEUE_BYTES:
                    reading[pipe.near] = (link, pipe)
                if pipe.queue and not pipe.held and not link.silent:
                    due = pipe.queue[0][0] - now
                    if due <= 0:
                        writing[pipe.far] = (link, pipe)
                    soon = max(0.0, min(soon, due))
        return reading, writing, soon

    def _accept(self):
        near, _ = self._listening.accept()
        self.accepted += 1
        if self.refuses:
            near.close()
            return
        far = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            far.connect(self._upstream)
        except BlockingIOError:
            pass
        except OSError:  # nobody is there, or no way
            near.close()
            far.close()
            return
        link = Link(near, far)
        link.silent = self.deaf
        self.links.append(link)

    def _read(self, link, pipe):
        try:
            data = pipe.near.recv(self._room(link))
        except BlockingIOError:
            return
        except OSError:  # nobody is there any more; what was said last still arrives at the other end
            self._forget(link, pipe.near)
            return
        if not data or link.lossy:
            pipe.ended = not data
            if not data and not pipe.queue and not link.lossy:
                self._pass_end(link, pipe)
        elif link.role is None and pipe.forward:
            self._prove(link, pipe, data)
        else:
            self._take(link, pipe, data)

    def _room(self, link):
        if link.role is None:
            return PREAMBLE_BYTES - len(link.preamble)
        budget = self.budget.get(link.role)
        return CHUNK if budget is None else max(1, min(CHUNK, budget))

    def _prove(self, link, pipe, data):
        link.preamble += data
        if len(link.preamble) == PREAMBLE_BYTES:
            try:
                link.role = unpack(link.preamble).role
            except ProtocolError:
                self._drop(link)
                return
            self._queue(link, pipe, link.role.name, link.preamble)
            if self._watches and link.role is CONTROL and self._opens is not None:
                link.opened = Opened(self._opens, self._upstream[0])
                self._queue(link, pipe, None, link.opened.begin())

    def _take(self, link, pipe, data):
        """Take what was read on its way, with what is to become of it there."""
        data = self._spoiled(link, data, self.spoil if pipe.forward else self.spoil_back)
        if link.opened is not None:
            self._look_in(link, pipe, data)
        elif self._watches and link.role is CONTROL:
            for name, message in pipe.messages(data):
                self._queue(link, pipe, name, message)
        else:
            self._queue(link, pipe, None, data)
        budget = self.budget.get(link.role)
        if budget is not None:
            self.budget[link.role] = budget - len(data)
            if self.budget[link.role] <= 0:
                del self.budget[link.role]
                link.doomed = True

    def _look_in(self, link, pipe, data):
        said, answer = link.opened.hear(data, forward=pipe.forward)
        if answer:
            self._queue(link, link.pipes[pipe.forward], None, answer)
        if pipe.forward:
            link.unsealed += pipe.messages(said)
        else:
            for name, message in pipe.messages(said):
                self._queue(link, pipe, name, link.opened.seal(message, forward=False))
        while link.unsealed and link.opened.can_seal(forward=True):
            name, message = link.unsealed.pop(0)
            self._queue(link, link.pipes[0], name, link.opened.seal(message, forward=True))

    def _queue(self, link, pipe, name, data):
        due = max(time.monotonic() + self.delay[link.role], pipe.free_at)
        if link.role in self.rate:
            due += len(data) / self.rate[link.role]
        pipe.free_at = due
        pipe.queue.append((due, name, data))
        pipe.waiting += len(data)
        if not pipe.held and not link.silent:  # at once, so that connections keep their order among each other
            self._write(link, pipe, time.monotonic())

    def _write(self, link, pipe, now):
        try:
            while pipe.queue and pipe.queue[0][0] <= now:
                due, name, data = pipe.queue[0]
                if name is not None and name == self._held:
                    self._held, pipe.held = None, True
                    self._reached.set()
                    return
                sent = pipe.far.send(data)
                pipe.waiting -= sent
                if sent < len(data):
                    pipe.queue[0] = (due, None, data[sent:])
                    return
                pipe.queue.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._forget(link, pipe.far)
            return
        if pipe.ended and not pipe.queue:
            self._pass_end(link, pipe)

    @staticmethod
    def _forget(link, gone):
        """Close a connection one end of which is gone, when what came from there has arrived at the other."""
        link.doomed = True
        for pipe in link.pipes:
            if pipe.far is gone:
                pipe.queue.clear()

    def _pass_end(self, link, pipe):
        """Tell one end that the other says no more; both have, and the connection is over."""
        with contextlib.suppress(OSError):
            pipe.far.shutdown(socket.SHUT_WR)
        if all(one.ended and not one.queue for one in link.pipes):
            link.close()
            self.links.remove(link)

    def _spoiled(self, link, data, spoil):
        at = spoil.get(link.role)
        if at is None:
            return data
        if at >= len(data):
            spoil[link.role] = at - len(data)
            return data
        del spoil[link.role]
        self.spoilt += 1
        return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def enter_namespace(name):
    """Have this thread's sockets made in a network namespace."""
    file = os.open(Path("/run/netns") / name, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(file, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns: {name}")
    finally:
        os.close(file)


def upstream_of(address):
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    return host, int(port)


def wait_for(condition, what, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)
