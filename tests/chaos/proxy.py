"""A TCP proxy between two agents that does what networks do: it delays, narrows, cuts, swallows, loses and spoils.

It stands in a thread of its own, in a network namespace if one is named. Each connection is known by the role in its
preamble. Faults are set by the test from outside: what is set for a role holds for connections of it that are there and
that come. One that watches also knows the messages on plain control connections, and keeps one back until it is let go:
what is forced so is an order.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import threading
import time
from pathlib import Path

from .link import Faults, Link

LOOK_SECONDS = 0.01
CLONE_NEWNET = 0x40000000


class Proxy(Faults):
    """Listens where the source dials, and forwards to `upstream` (host, port).

    `opens`: Credentials of both ends, for one that watches encrypted control connections.
    """

    def __init__(self, upstream, host="127.0.0.1", *, namespace=None, watches=False, opens=None):
        super().__init__()
        self._upstream = upstream
        self._host, self._namespace = host, namespace
        self._looks = {"watches": watches, "opens": opens, "upstream": upstream[0]}
        self.lock = threading.Lock()
        self.links = []
        self.accepted = self.cuts = 0
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
        assert self._thread.is_alive(), "the proxy has failed"
        self.clear()

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
            self.reached.clear()
            self.held = name

    def wait_held(self):
        """Return when what is to be held is."""
        assert self.reached.wait(20), f"{self.held} never came"

    def wait_passed(self):
        """Return when nothing waits here: all that was let go is with those whom it is for."""
        wait_for(lambda: not any(pipe.queue for link in list(self.links) for pipe in link.pipes), "it does not pass")

    def release(self):
        """Let go what is held."""
        with self.lock:
            self.held = None
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
                    link, pipe = reading.get(end, (None, None))
                    if link is not None and not link.over:
                        link.read(pipe)
                for end in writable:
                    link, pipe = writing[end]
                    if not link.over:
                        link.write(pipe, time.monotonic())
                self.links = [link for link in self.links if not link.over]

    def _interests(self, now):
        """Return the ends to read from and to write to, with their link and pipe, and how long nothing else is due."""
        reading, writing, soon = {}, {}, LOOK_SECONDS
        for link in list(self.links):
            if link.spent:
                self._drop(link)
                continue
            for pipe in link.pipes:
                if link.reads(pipe):
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
        self.links.append(Link(near, far, self, **self._looks))


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
