"""One connection through the proxy: what was read of it and where it goes, and the faults that it meets on its way."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import defaultdict, deque

from postcopy.errors import ProtocolError
from postcopy.wire.control import ControlDecoder
from postcopy.wire.messages import MESSAGES
from postcopy.wire.preamble import PREAMBLE_BYTES, Role, unpack

from .opened import Opened

CHUNK = 65536
QUEUE_BYTES = 256 << 10  # read ahead of what may be written: a long link holds no more
CONTROL, URGENT, PUSH = Role.CONTROL, Role.URGENT, Role.PUSH
NAMES = {shape: name for name, shape in MESSAGES.items()}


class Faults:
    """What a test has done to connections by their role, those that are there and those that come.

    `budget[role]`: so many bytes more in either direction, then the connection is cut, once. `spoil[role]`: the byte
    that many bytes ahead is changed, once, on the way to the destination; `spoil_back[role]` on the way to the source.
    `delay[role]`: seconds that each byte takes longer, `rate[role]`: bytes a second, either way. `refuses`: whoever
    comes is closed at once. `deaf`: whoever comes is let in and nothing of it is forwarded.
    """

    def __init__(self):
        self.spoilt = 0
        self.held = None  # the name of the message, or of the role, that is to be kept back
        self.reached = threading.Event()
        self.clear()

    def clear(self):
        """Do nothing to what comes from now on."""
        self.refuses = self.deaf = False
        self.budget, self.spoil, self.spoil_back = {}, {}, {}
        self.delay, self.rate = defaultdict(float), {}

    def room(self, role):
        """Return how many bytes may be read at a time."""
        budget = self.budget.get(role)
        return CHUNK if budget is None else max(1, min(CHUNK, budget))

    def spend(self, role, size):
        """Count what was read, and say whether the connection is to be cut behind it."""
        if role not in self.budget:
            return False
        self.budget[role] -= size
        if self.budget[role] > 0:
            return False
        del self.budget[role]
        return True

    def spoiled(self, role, data, *, forward):
        """Return what becomes of bytes."""
        spoil = self.spoil if forward else self.spoil_back
        at = spoil.get(role)
        if at is None:
            return data
        if at >= len(data):
            spoil[role] = at - len(data)
            return data
        del spoil[role]
        self.spoilt += 1
        return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]

    def stops(self, name):
        """Say whether this is what is to be kept back; what comes behind it is not."""
        if name is None or name != self.held:
            return False
        self.held = None
        self.reached.set()
        return True


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
    """Both directions of a connection. `role` is None until its preamble is there; `over` once it is closed.

    `watches`: it is known which message is which on a plain control connection; on an encrypted one with `opens`,
    Credentials of both ends, and `upstream`, the destination's host.
    """

    def __init__(self, near, far, faults, *, watches, opens, upstream):
        self.near, self.far = near, far
        self.faults = faults
        self._watches, self._opens, self._upstream = watches, opens, upstream
        self.role = None
        self.preamble = b""
        self.silent = faults.deaf  # nothing is read any more
        self.lossy = False  # all that is read is dropped
        self.doomed = False  # it is cut when what waits has gone
        self.over = False
        self.opened = None  # its TLS, where that is looked into
        self.unsealed = []  # messages for a destination that is not ready to hear them
        self.pipes = (Pipe(near, far, forward=True), Pipe(far, near, forward=False))

    @property
    def spent(self):
        """Whether it is to be cut now."""
        return self.doomed and not any(pipe.queue for pipe in self.pipes)

    def close(self, *, reset=False):
        self.over = True
        for end in (self.near, self.far):
            with contextlib.suppress(OSError):
                if reset:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    end.shutdown(socket.SHUT_RDWR)
            end.close()

    def reads(self, pipe):
        """Say whether there is room for more."""
        return not (self.silent or self.doomed or pipe.ended) and pipe.waiting < QUEUE_BYTES

    # --- what comes in ------------------------------------------------------------------------------------

    def read(self, pipe):
        """Take what there is."""
        room = PREAMBLE_BYTES - len(self.preamble) if self.role is None else self.faults.room(self.role)
        try:
            data = pipe.near.recv(room)
        except BlockingIOError:
            return
        except OSError:  # nobody is there any more; what was said last still arrives at the other end
            self._forget(pipe.near)
            return
        if not data or self.lossy:
            pipe.ended = not data
            if not data and not pipe.queue and not self.lossy:
                self._pass_end(pipe)
        elif self.role is None and pipe.forward:
            self._prove(pipe, data)
        else:
            self._take(pipe, data)

    def _prove(self, pipe, data):
        self.preamble += data
        if len(self.preamble) == PREAMBLE_BYTES:
            try:
                self.role = unpack(self.preamble).role
            except ProtocolError:
                self.doomed = True
                return
            self._queue(pipe, self.role.name, self.preamble)
            if self._watches and self.role is CONTROL and self._opens is not None:
                self.opened = Opened(self._opens, self._upstream)
                self._queue(pipe, None, self.opened.begin())

    def _take(self, pipe, data):
        """Take what was read on its way, with what is to become of it there."""
        data = self.faults.spoiled(self.role, data, forward=pipe.forward)
        if self.opened is not None:
            self._look_in(pipe, data)
        elif self._watches and self.role is CONTROL:
            for name, message in pipe.messages(data):
                self._queue(pipe, name, message)
        else:
            self._queue(pipe, None, data)
        if self.faults.spend(self.role, len(data)):
            self.doomed = True

    def _look_in(self, pipe, data):
        said, answer = self.opened.hear(data, forward=pipe.forward)
        if answer:
            self._queue(self.pipes[pipe.forward], None, answer)
        if pipe.forward:
            self.unsealed += pipe.messages(said)
        else:
            for name, message in pipe.messages(said):
                self._queue(pipe, name, self.opened.seal(message, forward=False))
        while self.unsealed and self.opened.can_seal(forward=True):
            name, message = self.unsealed.pop(0)
            self._queue(self.pipes[0], name, self.opened.seal(message, forward=True))

    # --- what goes out ------------------------------------------------------------------------------------

    def _queue(self, pipe, name, data):
        due = max(time.monotonic() + self.faults.delay[self.role], pipe.free_at)
        if self.role in self.faults.rate:
            due += len(data) / self.faults.rate[self.role]
        pipe.free_at = due
        pipe.queue.append((due, name, data))
        pipe.waiting += len(data)
        if not pipe.held and not self.silent:  # at once, so that connections keep their order among each other
            self.write(pipe, time.monotonic())

    def write(self, pipe, now):
        """Give on what is due."""
        try:
            while pipe.queue and pipe.queue[0][0] <= now:
                due, name, data = pipe.queue[0]
                if self.faults.stops(name):
                    pipe.held = True
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
            self._forget(pipe.far)
            return
        if pipe.ended and not pipe.queue:
            self._pass_end(pipe)

    def _forget(self, gone):
        """Close the connection, one end of which is gone, when what came from there has arrived at the other."""
        self.doomed = True
        for pipe in self.pipes:
            if pipe.far is gone:
                pipe.queue.clear()

    def _pass_end(self, pipe):
        """Tell one end that the other says no more; both have, and the connection is over."""
        with contextlib.suppress(OSError):
            pipe.far.shutdown(socket.SHUT_WR)
        if all(one.ended and not one.queue for one in self.pipes):
            self.close()
