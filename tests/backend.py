"""The test's end of a second process (second_process.py) that maps a guest's memory and touches it when told to."""

from __future__ import annotations

import socket
import subprocess
import sys
from types import TracebackType
from typing import Self

from postcopy.kernel import Mode, Userfaultfd

WAIT = 10.0  # seconds; a deadline, never a delay


class Backend:
    """A process with a mapping of `fd`; `uffd` is its userfaultfd, `address` where the memory lies there."""

    def __init__(self, fd: int, size: int, type_name: str, modes: Mode = Mode.MISSING | Mode.MINOR) -> None:
        self._connection, theirs = socket.socketpair()
        self._connection.settimeout(WAIT)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.second_process", str(theirs.fileno()), type_name, str(int(modes))],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        socket.send_fds(self._connection, [size.to_bytes(8, "little")], [fd])
        self.uffd = Userfaultfd.receive(self._connection)
        self.address = int.from_bytes(self._connection.recv(8, socket.MSG_WAITALL), "little")
        self._lines = self._connection.makefile("r")

    def ask(self, *words: object) -> None:
        """Have it do something in a thread of its own; what comes of it is told later."""
        self._connection.sendall(f"{' '.join(map(str, words))}\n".encode())

    def told(self) -> str:
        """Return what it says next."""
        return self._lines.readline().strip()

    def read(self, page: int) -> bytes:
        """Have it read a page's first bytes, and wait for them."""
        self.ask("read", page)
        what, number, content = self.told().split()
        assert (what, int(number)) == ("read", page)
        return bytes.fromhex(content)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait(WAIT)
        self._lines.close()
        self._connection.close()
