"""The keeper: a small process that holds the files of a guest's memory, and what it takes to go on with its migration.

It is started by a source's agent, which may then be killed; its memory is not lost by that, for files live as long as
somebody holds them. Files and an agent's connection come as descriptors, records over that connection; an agent that
takes the killed one's place connects to the keeper's socket (mode 0600, root or its own user only) and gets both. It
ends when it is told that nobody needs it any more, or when its agent goes before there is anything to go on with.

Messages are a letter, a length (4 bytes, little endian) and so many bytes: K keep this record, F forget it, R release.
Nothing but the standard library is loaded, and of that little: it may have to stay for days.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
from pathlib import Path

_HEAD = struct.Struct("<cI")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
# Both the state of the guest, which a message of the protocol bounds to 16 MiB, and some words.
RECORD_BYTES_MAX = (16 << 20) + 4096


def receive(connection: socket.socket, count: int) -> bytes:
    """Return exactly so many bytes; OSError at the end of the connection."""
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionResetError("the connection ended")
        data += piece
    return bytes(data)


def send(connection: socket.socket, letter: bytes, data: bytes = b"") -> None:
    """Send one message."""
    connection.sendall(_HEAD.pack(letter, len(data)) + data)


def hear(connection: socket.socket) -> tuple[bytes, bytes]:
    """Return the letter and the bytes of one message; OSError for what is none."""
    letter, length = _HEAD.unpack(receive(connection, _HEAD.size))
    if length > RECORD_BYTES_MAX:
        raise ConnectionResetError("not a message")
    return letter, receive(connection, length)


class Keeper:
    """Holds `files`, serves one agent at a time; `owner` is the first one's connection."""

    def __init__(self, path: str, owner: socket.socket, files: list[int]) -> None:
        self._path = path
        self._owner: socket.socket | None = owner
        self._files = files
        self._record: bytes | None = None
        before = os.umask(0o177)
        try:
            self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listening.bind(path)
        finally:
            os.umask(before)
        self._listening.listen(4)

    def run(self) -> None:
        """Serve until nobody needs it any more."""
        while self._owner is not None or self._record is not None:
            watched = [self._listening, *([self._owner] if self._owner is not None else [])]
            ready, _, _ = select.select(watched, [], [])
            if self._owner in ready and not self._obey(self._owner):
                break
            if self._listening in ready:
                self._admit()
        Path(self._path).unlink(missing_ok=True)

    def _obey(self, owner: socket.socket | None) -> bool:
        """Do what the agent says, or take note of its end; False: release."""
        if owner is None:
            return True
        try:
            letter, data = hear(owner)
        except OSError:
            owner.close()
            self._owner = None
            return True
        if letter == b"K":
            self._record = data
            send(owner, b"K")
        elif letter == b"F":
            self._record = None
        return letter != b"R"

    def _admit(self) -> None:
        """Give everything to an agent that takes the former one's place; close whoever may not, or comes too early."""
        connection, _ = self._listening.accept()
        connection.settimeout(5)
        packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(packed)
        try:
            if uid in {0, os.geteuid()} and self._owner is None and self._record is not None:
                socket.send_fds(connection, [_HEAD.pack(b"K", len(self._record))], self._files)
                connection.sendall(self._record)
                connection.settimeout(None)
                self._owner = connection
                return
        except OSError:
            pass
        connection.close()


def main() -> None:
    """Run: keeper PATH OWNER FILE…, the latter two as numbers of descriptors that are open."""
    path, owner, *files = sys.argv[1:]
    keeper = Keeper(path, socket.socket(fileno=int(owner)), [int(file) for file in files])
    keeper.run()


if __name__ == "__main__":
    main()
