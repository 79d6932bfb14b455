"""A relay between a source and a destination over Unix sockets: it sees each message, and holds the network.

Whatever `on` says about a message, by its name, happens before the message goes on: what is forced so is an order.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from pathlib import Path

from postcopy.wire.control import ControlDecoder
from postcopy.wire.messages import MESSAGES
from postcopy.wire.preamble import PREAMBLE_BYTES, Role, unpack

from .fakes import SECONDS, connect

NAMES = {shape: name for name, shape in MESSAGES.items()}


class Cut(Exception):  # noqa: N818 - not an error: what a test wants
    """Raised by `on`: the network ends here, for both."""


class Relay:
    """Listens at `address`; `on(name)` is called with "files" and the name of each message before it is passed on."""

    def __init__(self, folder, destination, on):
        self.address = f"unix:{folder}/relay.sock"
        self.seen = []
        self._destination = destination
        self._on = on
        self._ends = []
        self._threads = []
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(f"{folder}/relay.sock")
        self._listening.listen(8)
        self._path = f"{folder}/relay.sock"

    def __enter__(self):
        self._spawn(self._accept)
        return self

    def __exit__(self, *_):
        self._listening.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:  # the list grows while threads are waited for
            thread.join(SECONDS)
        for end in [self._listening, *self._ends]:
            end.close()
        Path(self._path).unlink()

    def _spawn(self, work, *arguments):
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def cut(self):
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                self._ends.append(near)
                self._spawn(self._serve, near)

    def _serve(self, near):
        far = connect(self._destination)
        far.settimeout(None)
        self._ends.append(far)
        try:
            preamble = near.recv(PREAMBLE_BYTES, socket.MSG_WAITALL)
            far.sendall(preamble)
        except OSError:  # cut at this very moment
            return
        if len(preamble) < PREAMBLE_BYTES:  # and so is this
            return
        if unpack(preamble).role is Role.MEMORY:
            pairs = [(self._pass_bytes, far, near), (self._pass_files, near, far)]
        else:
            pairs = [(self._pass_messages, far, near), (self._pass_messages, near, far)]
        for work, source, target in pairs:
            self._spawn(self._pass, work, source, target)

    def _pass(self, work, source, target):
        try:
            work(source, target)
        except Cut:
            self.cut()
        except OSError:
            pass
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _tell(self, name):
        self.seen.append(name)
        self._on(name)

    def _pass_bytes(self, source, target):
        while data := source.recv(65536):
            target.sendall(data)

    def _pass_files(self, source, target):
        data, ancillary, _, _ = source.recvmsg(1, socket.CMSG_SPACE(64 * 4))
        files = array.array("i")
        for _level, _kind, payload in ancillary:
            files.frombytes(payload)
        try:
            if not data:
                return
            self._tell("files")
            socket.send_fds(target, [data], files)
        finally:
            for file in files:
                os.close(file)
        self._pass_bytes(source, target)

    def _pass_messages(self, source, target):
        decoder = ControlDecoder()
        while data := source.recv(65536):
            for message in decoder.feed(data):
                self._tell(NAMES[type(message)])
            target.sendall(data)


def open_files(pid):
    """Return how many descriptors a process has."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
