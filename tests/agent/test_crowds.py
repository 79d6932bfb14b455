"""Whoever dials a destination and says what anybody can, again and again: the log stays short, and sources get in."""

from __future__ import annotations

import threading
import time

import pytest

from postcopy.limits import LINES_MAX, LINES_SECONDS
from postcopy.wire.control import Hello, Refuse, Resume, Welcome, encode
from postcopy.wire.preamble import Preamble, Role, pack
from postcopy.wire.version import VERSION, VERSION_MIN
from tests.agent.agents import destination, run, source
from tests.agent.fakes import Channel, connect

HELLO = Hello((VERSION_MIN, VERSION), "a stranger")
RESUME = Resume(b"\1" * 16, b"\2" * 32)
CALLS = 150


def call(address, message):
    """Dial, say this, hear the answer."""
    channel = Channel(connect(address))
    channel.socket.sendall(pack(Preamble(Role.CONTROL)) + encode(message, VERSION))
    return channel, channel.receive()


class Greeters:
    """So many at a time that say hello and no more, and dial anew as soon as they are closed."""

    def __init__(self, address, count):
        self.address = address
        self.answered = threading.Barrier(count + 1)
        self.ending = threading.Event()
        self.threads = [threading.Thread(target=self._greet) for _ in range(count)]

    def _greet(self):
        waited = False
        while not self.ending.is_set():
            channel, _ = call(self.address, HELLO)
            if not waited:
                self.answered.wait(20)
                waited = True
            channel.socket.settimeout(0.1)
            while not self.ending.is_set():
                try:
                    if channel.receive() is None:
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
            channel.close()

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        self.answered.wait(20)
        return self

    def __exit__(self, *_):
        self.ending.set()
        for thread in self.threads:
            thread.join(20)


@pytest.mark.parametrize(("message", "answer"), [(HELLO, Welcome), (RESUME, Refuse)], ids=["hello", "resume"])
def test_what_anybody_can_say_is_a_line_at_the_most_and_then_counted(message, answer, tmp_path):
    with destination(tmp_path) as there:
        before, began = there.log.count("\n"), time.monotonic()
        for _ in range(CALLS):
            channel, said = call(there.address, message)
            assert isinstance(said, answer)
            channel.close()
        there.until_log(r"closed \d+ more connections within")
        whiles = 1 + (time.monotonic() - began) // LINES_SECONDS
        lines = there.log.splitlines()[before:]
        assert len(lines) <= (LINES_MAX + 1) * whiles, lines[:8]
        assert all("closed " in line for line in lines), lines[:8]


def test_a_source_comes_through_a_crowd_that_only_says_hello(tmp_path):
    with destination(tmp_path) as there, source(tmp_path, size="8MiB") as here, Greeters(there.address, 24):
        moved = run("migrate", "--admin", here.admin, there.address, "--json")
        assert moved.status == 0, moved.err
        assert moved.json["outcome"] == "completed"
