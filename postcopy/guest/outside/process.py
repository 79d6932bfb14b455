"""The process at the other end of a Unix socket: who it is, and when it ends.

A connection enters; a process that can be waited for leaves, or the reason why it is not to be served.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from pathlib import Path

from postcopy.errors import HostError, ProtocolError
from postcopy.link.sockets import check_peer

_SO_PEERPIDFD = 77  # Linux 6.5: no other process can have come to that number meanwhile


class Process:
    """A process of this host; `ended` is set once it has ended. close() it."""

    def __init__(self, connection: socket.socket) -> None:
        """Take the peer; ProtocolError unless it is root's or this user's, HostError where it cannot be watched."""
        self.pid = check_peer(connection)
        self._pidfd = _open(connection, self.pid)
        self.ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._pidfd, self._end)

    def __str__(self) -> str:
        return f"process {self.pid}"

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self.ended.set()

    @property
    def lives(self) -> bool:
        """Whether it has not ended, also where the loop had no time yet to learn of it."""
        if self.ended.is_set():
            return False
        looked = select.poll()  # select() knows no descriptor beyond 1023
        looked.register(self._pidfd, select.POLLIN)
        return not looked.poll(0)

    def mapped(self, file: tuple[int, int]) -> list[tuple[int, int, int]]:
        """Return where it has mapped a file (device, inode), shared and for writing: (start, stop, offset), ascending.

        HostError where the kernel does not let this process know: it must have the right to trace the other
        (ptrace(2)), as root's has, and that of the same user unless the other forbids it (PR_SET_DUMPABLE).
        """
        try:
            lines = Path(f"/proc/{self.pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as refused:
            raise HostError(f"what it has mapped is not to be seen: {refused}") from refused
        if not self.lives:  # and so the number may be another one's
            raise ProtocolError("it has ended")
        found = []
        for line in lines:
            place, rights, offset, device, inode, *_ = line.split(maxsplit=5)
            major, minor = (int(number, 16) for number in device.split(":"))
            if (os.makedev(major, minor), int(inode)) == file and rights[1] == "w" and rights[3] == "s":
                start, stop = (int(number, 16) for number in place.split("-"))
                found.append((start, stop, int(offset, 16)))
        return found

    def close(self) -> None:
        """Watch it no more; whoever waits for its end waits no longer."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self.ended.set()


def _open(connection: socket.socket, pid: int) -> int:
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, struct.calcsize("i"))
        return int(struct.unpack("i", packed)[0])
    except OSError:
        pass  # before 6.5, or it has been reaped
    try:
        return os.pidfd_open(pid)
    except (OSError, ValueError) as error:
        raise HostError(f"process {pid} cannot be watched: {error}") from error
