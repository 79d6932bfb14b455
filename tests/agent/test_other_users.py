"""Within a host the kernel says whose the other end of plain TCP is: one's own user or root comes in, nobody else."""

import asyncio
import os
import socket
import subprocess
import sys

import pytest

from postcopy.errors import ProtocolError
from postcopy.link import users
from postcopy.link.users import check_dialler, check_listener
from tests.lacking import lacking

from .agents import AS_NOBODY, NOBODY, destination, run, source

SECONDS = 20
OTHERS = f"user {NOBODY} {{}}, who is neither this agent's user nor root: between users it takes --tls-dir"

_LISTEN = """
import os, socket
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.create_server(("127.0.0.1", 0)) as listening:
    print(listening.getsockname()[1], flush=True)
    connection, _ = listening.accept()
    print(len(connection.recv(1)))
"""
_DIAL = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.socket() as connection:
    connection.connect((b"127.0.0.1", int(sys.argv[1])))
    print(len(connection.recv(1)))
"""


@pytest.fixture
def as_nobody():
    if os.geteuid():
        lacking("only root can become another user")


def test_a_guest_of_another_user_does_not_come_in(tmp_path, as_nobody):
    with destination(tmp_path) as there:
        asked = run("doctor", "--peer", there.address, program=AS_NOBODY)
        assert asked.status == 4, asked
        assert OTHERS.format("dialled") in asked.out + asked.err
        there.until_log(rf"closed 127\.0\.0\.1:\d+: user {NOBODY} dialled, who is neither")
        assert there.status()["state"] == "none"


def test_memory_is_not_sent_to_another_user(tmp_path, as_nobody):
    with (
        source(tmp_path, size="8MiB") as here,
        subprocess.Popen([sys.executable, "-c", _LISTEN], stdout=subprocess.PIPE, text=True) as other,
    ):
        port = other.stdout.readline().strip()
        done = run("migrate", "--admin", here.admin, f"tcp:127.0.0.1:{port}")
        assert done.status == 4
        assert OTHERS.format("listens there") in done.one_line()
        assert other.communicate(timeout=SECONDS)[0] == "0\n"  # not a byte was said
        here.runs_on()


def accepted(listening, dialled):
    dialled.settimeout(SECONDS)
    dialled.connect(("127.0.0.1" if dialled.family == socket.AF_INET else "::1", listening.getsockname()[1]))
    return listening.accept()[0]


@pytest.mark.parametrize(("listens", "dials"), [("4", "4"), ("6", "6"), ("46", "4"), ("46", "6")])
def test_ones_own_user_comes_in_by_every_family(monkeypatch, listens, dials):
    family = socket.AF_INET if listens == "4" else socket.AF_INET6
    bound = {"4": "127.0.0.1", "6": "::1", "46": "::"}[listens]
    with (
        socket.create_server((bound, 0), family=family, dualstack_ipv6=listens == "46") as listening,
        socket.socket(socket.AF_INET if dials == "4" else socket.AF_INET6) as dialled,
        accepted(listening, dialled) as taken,
    ):
        asyncio.run(check_dialler(taken))
        asyncio.run(check_listener(dialled))
        listening.close()
        asyncio.run(check_listener(dialled))
        monkeypatch.setattr(users, "TABLES", ())
        with pytest.raises(ProtocolError, match="does not say whose"):
            asyncio.run(check_dialler(taken))


def test_another_user_is_told_from_ones_own_on_one_port(as_nobody):
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.socket() as own,
        accepted(listening, own) as taken,
        subprocess.Popen(
            [sys.executable, "-c", _DIAL, str(listening.getsockname()[1])], stdout=subprocess.PIPE, text=True
        ) as other,
    ):
        listening.settimeout(SECONDS)
        with listening.accept()[0] as theirs:
            asyncio.run(check_dialler(taken))
            with pytest.raises(ProtocolError, match=f"user {NOBODY} dialled"):
                asyncio.run(check_dialler(theirs))
        assert other.communicate(timeout=SECONDS)[0] == "0\n"
