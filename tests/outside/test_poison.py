"""What is poisoned beside the pages of the process itself: a child's, and what a page given back in part leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from postcopy.guest.outside.poison import Poisoner, poison_what_is_there
from postcopy.kernel import Outcome, Placed, Userfaultfd
from postcopy.kernel.events import Remove

PAGE, HUGE = 4096, 2 << 20
PAGES, HERE = 8, 2

# Forks with one page there; the child touches one behind it and tells how that ended.
_FORKS = """
import os, socket, sys
from postcopy.kernel import Feature, Mode, Userfaultfd, calls
address = calls.map_anonymous(8 * 4096)
uffd = Userfaultfd.open(Feature.EVENT_FORK)
uffd.register(address, 8 * 4096, Mode.MISSING)
uffd.copy(address + 2 * 4096, b"x" * 4096)
connection = socket.socket(fileno=int(sys.argv[1]))
uffd.send(connection)
connection.send(address.to_bytes(8, "little"))
child = os.fork()
if not child:
    connection.recv(1)
    calls.read_memory(address + 5 * 4096, 1)
    os._exit(0)
sys.exit(-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("refused", [False, True])
def test_a_child_that_is_forked_meanwhile_reads_no_zeros(refused):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _FORKS, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=os.curdir
        )
        try:
            with Userfaultfd.receive(ours) as uffd:
                os.set_blocking(uffd.fd, False)
                address = int.from_bytes(ours.recv(8), "little")
                assert uffd.poll(30), "no fork was told of"
                if refused:
                    poison_what_is_there(uffd, [(address, PAGES * PAGE, PAGE)])
                else:
                    maps = bytes(3 if page == HERE else 0 for page in range(PAGES))
                    assert Poisoner(uffd, [(address, PAGE)], [maps]).run() == PAGES - 1
                ours.send(b".")
                assert process.wait(30) == signal.SIGBUS
        finally:
            process.kill()
            process.wait()


class Telling:
    """A userfaultfd that has one thing to tell before it places anything."""

    def __init__(self, message):
        self.messages = [message]
        self.poisoned = []

    def poison(self, address, length):
        if self.messages:
            return Placed(Outcome.RETRY, 0)
        self.poisoned.append((address, length))
        return Placed(Outcome.PLACED, length)

    def read(self):
        told, self.messages = self.messages, []
        return told


def test_a_page_of_which_a_part_was_given_back_is_lost():
    telling = Telling(Remove(HUGE + HUGE // 2, 4 * HUGE - HUGE // 2))
    assert Poisoner(telling, [(HUGE, HUGE)], [bytes(4)]).run() == 3
    assert telling.poisoned == [(HUGE, HUGE), (3 * HUGE, 2 * HUGE)]
