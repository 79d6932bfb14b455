"""The keeper: a small process that holds the files of a guest's memory, and what it takes to go on with its migration.

The agent that starts it may be killed; no memory is lost by that, for files live as long as somebody holds them. What
there is to know is written into the first of the files, the record (agent/kept.py), by the agent itself: nothing is
asked of the keeper while a guest stands still, and one that is stopped, or busy, keeps as well as any other. When the
agent's connection ends it looks there: it ends, too, where nothing is written, and otherwise waits at its socket (mode
0600, root or its own user only) for an agent that takes the former one's place, which gets all the files.

Nothing but the standard library is loaded, and of that little: it may have to stay for days.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys

HEAD = struct.Struct("<QQ")
"""How the record's file begins: where in it the record lies, and its length, 0: nothing is there to go on with."""
HERE = b"K"
"""What a keeper says once it holds everything, and with the files."""
LIVES = struct.Struct("<ci")
"""What it says to whoever comes too early: an L, and the process of the agent that lives."""

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Keeper:
    """Holds `files`, the record's first, for one agent at a time; `owner` is the first one's connection."""

    def __init__(self, path: str, listening: socket.socket, owner: socket.socket, files: list[int]) -> None:
        self._path = path
        self._listening = listening
        self._owner: socket.socket | None = owner
        self._files = files

    def run(self) -> None:
        """Serve until nobody needs it any more."""
        self._listening.setblocking(True)
        self._listening.listen(4)  # from here on it is this process that whoever connects is told of
        with contextlib.suppress(OSError):
            self._owner.send(HERE) if self._owner is not None else None
        while self._owner is not None or self._wanted():
            watch = select.poll()  # descriptors come as the agent had them, however high they are numbered
            for one in (self._listening, self._owner):
                if one is not None:
                    watch.register(one, select.POLLIN)
            ready = {number for number, _ in watch.poll()}
            if self._owner is not None and self._owner.fileno() in ready:
                self._hear(self._owner)
            elif self._listening.fileno() in ready:
                self._admit()
        with contextlib.suppress(OSError):
            os.unlink(self._path)  # noqa: PTH108 - before it listens no more, so that nobody else's can be meant

    def _wanted(self) -> bool:
        """Whether there is anything to go on with."""
        head = os.pread(self._files[0], HEAD.size, 0)
        return len(head) == HEAD.size and HEAD.unpack(head)[1] > 0

    def _hear(self, owner: socket.socket) -> None:
        """Take note of the agent's end; it has nothing to say."""
        with contextlib.suppress(OSError):
            if owner.recv(4096):
                return
        owner.close()
        self._owner = None

    def _admit(self) -> None:
        """Give everything to an agent that takes the former one's place; close whoever may not, or comes too early.

        The latter is told whose place he would take.
        """
        try:
            connection, _ = self._listening.accept()
        except OSError:  # it has gone again
            return
        try:
            if peer_of(connection)[1] in {0, os.geteuid()}:
                if self._owner is None:
                    socket.send_fds(connection, [HERE], self._files)
                    self._owner = connection
                    return
                connection.send(LIVES.pack(b"L", peer_of(self._owner)[0]))
        except OSError:
            pass
        connection.close()


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return the process at the other end, and its user."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    return pid, uid


def main() -> None:
    """Run: keeper PATH LISTENING OWNER RECORD FILE…, all but the first as numbers of descriptors that are open."""
    path, *numbers = sys.argv[1:]
    listening, owner, *files = map(int, numbers)
    Keeper(path, socket.socket(fileno=listening), socket.socket(fileno=owner), files).run()


if __name__ == "__main__":
    main()
