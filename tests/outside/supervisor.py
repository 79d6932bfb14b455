"""A stand-in for systemd: keeps the descriptors that a daemon leaves with it, and starts the daemon again with them.

By sd_notify(3), sd_pid_notify_with_fds(3) and sd_listen_fds(3), and nothing of the project.
"""

from __future__ import annotations

import array
import os
import re
import select
import socket
import sys
import threading
import time

from tests.agent.agents import Daemon

# Becomes the daemon: the descriptors begin at 3, and LISTEN_PID is the process that runs it.
LAUNCH = """
import fcntl, os, sys
notify, names, numbers, *command = sys.argv[1:]
at = command.index("--ready-fd") + 1
high = [fcntl.fcntl(int(one), fcntl.F_DUPFD, 100) for one in (command[at], *numbers.split(",")) if one]
command[at] = str(high[0])
for place, one in enumerate(high[1:], 3):
    os.dup2(one, place)
    os.close(one)
os.closerange(2 + len(high), 100)
told = {"NOTIFY_SOCKET": notify}
if len(high) > 1:
    told |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(high) - 1), "LISTEN_FDNAMES": names}
os.execve(command[0], command, {**os.environ, **told})
"""


class Supervisor:
    """Kept descriptors are in `kept`, lists by name."""

    def __init__(self, folder):
        self.path = f"{folder}/notify"
        self.kept = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._say(b"END")
        self._thread.join()
        self._socket.close()
        for one in self.descriptors:
            os.close(one)

    @property
    def descriptors(self):
        return [one for kept in self.kept.values() for one in kept]

    def _say(self, word):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(word, self.path)

    def _run(self):
        while True:
            said, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(4 * 16), socket.MSG_CMSG_CLOEXEC)
            files = array.array("i")
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    files.frombytes(payload[: len(payload) - len(payload) % files.itemsize])
            if said == b"END":
                return
            lines = dict(line.split("=", 1) for line in said.decode().splitlines())
            if lines.get("FDSTORE") == "1":
                assert lines["FDPOLL"] == "0"  # or an end of the process would have them thrown away
                assert re.fullmatch("[!-9;-~]{1,255}", lines["FDNAME"])
                # the latest first, and so in another order than they were said
                self.kept[lines["FDNAME"]] = [*reversed(files), *self.kept.get(lines["FDNAME"], [])]
            if lines.get("FDSTOREREMOVE") == "1":
                for one in self.kept.pop(lines["FDNAME"]):
                    os.close(one)

    def settle(self):
        """Return once all that was said before has been heard."""
        while select.select([self._socket], [], [], 0)[0]:
            time.sleep(0.001)  # between two looks, not to force an order

    def start(self, folder, *arguments):
        self.settle()
        names = ":".join(name for name, kept in self.kept.items() for _ in kept)
        numbers = ",".join(map(str, self.descriptors))
        inside = [sys.executable, "-c", LAUNCH, self.path, names, numbers]
        more = ("--handover", f"unix:{folder}/uffd.sock", "--keep", *arguments)
        return Daemon(folder, "destination", *more, inside=inside, keep=self.descriptors)
