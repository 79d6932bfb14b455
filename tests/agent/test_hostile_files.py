"""Whoever hands over something else than memory is refused in one line; nothing is kept, and the place is free."""

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from postcopy.wire.control import Cancel, Hello, Ready, Refuse, RegionOffer, Welcome, encode
from postcopy.wire.messages import HANDED_OVER
from postcopy.wire.preamble import ACCEPTED, FILES, Preamble, Role, pack
from tests.lacking import lacking

from .agents import NOBODY, Command, destination, run, source
from .fakes import OFFER, SECONDS, Channel, FakeSource, ends
from .relay import open_files

SIZE = OFFER.regions[0].size
ONE = replace(OFFER, memory=HANDED_OVER)
TWO = replace(ONE, regions=OFFER.regions * 2)
HUGE = replace(ONE, regions=(RegionOffer("hugetlb-2M", 2 << 20, 2 << 20),))
HUGE_FLAGS = os.MFD_ALLOW_SEALING | os.MFD_HUGETLB
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A destination that is as good as new after every test of this module: a guest comes to it in the end."""
    folder = tmp_path_factory.mktemp("hostile")
    with (
        destination(folder, "--listen", f"unix:{folder}/memory.sock") as daemon,
        source(folder, size="8MiB") as here,
    ):
        yield daemon
        assert run("migrate", "--admin", here.admin, daemon.address).status == 0
        assert run("check", "--admin", daemon.admin).status == 0
        assert "Traceback" not in daemon.log


@pytest.fixture
def unharmed(there):
    """See that the destination has no more descriptors afterwards than it had before."""
    before = open_files(there.process.pid)
    yield
    end = time.monotonic() + SECONDS
    while open_files(there.process.pid) > before:
        assert time.monotonic() < end, (open_files(there.process.pid), before)
        time.sleep(0.01)  # between two looks, not to force an order
    assert there.status()["owner"] is None


@pytest.fixture
def fake(there, unharmed):
    with FakeSource(there.address) as found:
        yield found.greet()


def memfd(size=SIZE, seals=0, flags=os.MFD_ALLOW_SEALING):
    fd = os.memfd_create("a test", flags)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def attach_memory(fake):
    fake.attach(Role.MEMORY)
    return fake.data[Role.MEMORY]


def hand_over(fake, files, offer=ONE, word=FILES):
    """Offer, and hand these files over, which are closed here."""
    fake.control.send(offer)
    try:
        socket.send_fds(attach_memory(fake), [word], files)
    finally:
        for file in files:
            os.close(file)


def refused(fake, code, text):
    answer = fake.control.expect(Refuse)
    assert answer.code == code, answer
    assert text in answer.text
    assert fake.control.receive() is None


def twice(fd):
    return [fd, os.dup(fd)]


@pytest.mark.parametrize(
    ("make", "offer", "code", "text"),
    [
        (lambda: [memfd(SIZE - 4096)], ONE, "layout", f"its file has {SIZE - 4096} bytes, not {SIZE}"),
        (lambda: [memfd(SIZE + 4096)], ONE, "layout", f"its file has {SIZE + 4096} bytes, not {SIZE}"),
        (lambda: [memfd(seals=fcntl.F_SEAL_SEAL)], ONE, "layout", "does not let itself be sealed"),
        (lambda: [memfd(seals=SIZE_SEALS | fcntl.F_SEAL_WRITE)], ONE, "layout", "is sealed against writing"),
        (lambda: [memfd(seals=SIZE_SEALS | 0x10)], ONE, "layout", "is sealed against writing"),
        (lambda: twice(memfd()), TWO, "layout", "region 1 (shmem) is the same file as region 0"),
        (lambda: [memfd(2 << 20)], HUGE, "layout", "its file has pages of 4 KiB, not 2 MiB"),
        (lambda: [memfd(2 << 20, flags=HUGE_FLAGS)], ONE, "layout", "its file has pages of 2 MiB, not 4 KiB"),
        (lambda: [os.open("/dev/zero", os.O_RDWR)], ONE, "layout", "is none of shmem or hugetlbfs"),
        (lambda: [os.open("/proc/self/exe", os.O_RDONLY)], ONE, "layout", "is not open for reading and writing"),
        (lambda: twice(memfd()), ONE, "protocol", "more than 1 files came for 1 regions"),
        (lambda: [memfd() for _ in range(64)], ONE, "protocol", "more than 1 files came for 1 regions"),
        (lambda: [memfd()], TWO, "protocol", "1 files came for 2 regions"),
        (list, ONE, "protocol", "0 files came for 1 regions"),
    ],
    ids=[
        "short", "long", "sealed for good", "read-only", "read-only later", "one file twice", "small pages",
        "huge pages", "a device", "a program", "one too many", "64", "one too few", "none",
    ],
)  # fmt: skip
def test_files_that_are_not_as_offered(make, offer, code, text, fake):
    hand_over(fake, make(), offer)
    refused(fake, code, text)


def test_another_byte(fake):
    hand_over(fake, [memfd()], word=b"\x45")
    refused(fake, "protocol", "carries the byte 45, not 46 and files")


def test_a_memory_connection_that_ends(fake):
    fake.control.send(ONE)
    attach_memory(fake).shutdown(socket.SHUT_WR)
    refused(fake, "protocol", "the memory connection ended before the files came")


def test_nobody_cuts_the_memory_short_once_it_was_taken(fake):
    """The destination's word Ready stands on a size that no one can change any more: no SIGBUS, ever."""
    file = memfd()
    os.ftruncate(file, SIZE)  # until then it may be
    hand_over(fake, [os.dup(file)])
    fake.control.expect(Ready)
    for size in (0, SIZE - 4096, SIZE + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(file, size)
    os.close(file)
    fake.control.close()


def test_a_source_that_hands_nothing_over_holds_nothing_up_that_can_be_cancelled(fake, there):
    fake.control.send(ONE)
    memory = attach_memory(fake)
    assert there.status()["state"] == "setup"
    assert run("cancel", "--admin", there.admin).status == 0
    fake.control.expect(Cancel)
    assert ends(memory)


def test_files_that_come_before_the_offer_wait_for_it(fake):
    memory = fake.dial(Role.MEMORY, fake.welcome.migration_id, fake.welcome.token)
    memory.settimeout(SECONDS)
    fake.data[Role.MEMORY] = memory
    fake.control.send(ONE)
    assert memory.recv(1) == ACCEPTED
    file = memfd()
    socket.send_fds(memory, [FILES], [file])
    os.close(file)
    fake.control.expect(Ready)


def test_memory_connections_that_prove_nothing_or_come_twice(fake):
    right = (fake.welcome.migration_id, fake.welcome.token)
    for wrong in ((b"x" * 16, right[1]), (right[0], b"x" * 32)):
        with fake.dial(Role.MEMORY, *wrong) as connection:
            assert ends(connection)
    fake.control.send(ONE)
    attach_memory(fake)
    with fake.dial(Role.MEMORY, *right) as connection:
        assert ends(connection)


def test_a_source_that_greets_and_attaches_and_offers_nothing(fake):
    memory = fake.dial(Role.MEMORY, fake.welcome.migration_id, fake.welcome.token)
    fake.control.close()
    assert ends(memory)
    memory.close()


def test_memory_is_not_handed_over_through_tcp(tmp_path):
    with destination(tmp_path) as there, FakeSource(there.address) as fake:
        fake.greet().control.send(ONE)
        answer = fake.control.expect(Refuse)
        assert answer.code == "layout"
        assert answer.text == "memory is handed over on one host only, to a destination that listens on unix:PATH"


# --- another user -----------------------------------------------------------------------------------------------------

_SPEAK = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    try:
        connection.sendall(bytes.fromhex(sys.argv[2]))
        print(len(connection.recv(1)))
    except (BrokenPipeError, ConnectionResetError):
        print(0)
"""
_LISTEN = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(sys.argv[1]); listening.listen(1)
    print("listening", flush=True)
    connection, _ = listening.accept()
    print(len(connection.recv(1)))
"""


@pytest.fixture
def open_folder():
    """A folder in which every user may make a socket; not pytest's own, which it closes again at any time."""
    if os.geteuid():
        lacking("only root can become another user")
    with tempfile.TemporaryDirectory(prefix="postcopy-test-") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def test_another_user_is_not_let_in(open_folder):
    with destination(open_folder, "--listen", f"unix:{open_folder}/memory.sock") as there:
        path = there.address.removeprefix("unix:")
        assert Path(path).stat().st_mode & 0o777 == 0o600
        Path(path).chmod(0o666)  # even then the kernel tells who comes
        preamble = pack(Preamble(Role.CONTROL)).hex()
        done = subprocess.run(
            [sys.executable, "-c", _SPEAK, path, preamble], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, "0\n")
        there.until_log(rf"closed process \d+ of user {NOBODY}: .* is neither of this agent's user nor root")


def test_memory_is_not_handed_to_another_user(open_folder):
    path = f"{open_folder}/theirs.sock"
    with (
        source(open_folder, size="8MiB") as here,
        subprocess.Popen([sys.executable, "-c", _LISTEN, path], stdout=subprocess.PIPE, text=True) as other,
    ):
        assert other.stdout.readline() == "listening\n"
        Path(path).chmod(0o666)  # without it an agent that gave its capabilities up does not even get as far as that
        done = run("migrate", "--admin", here.admin, f"unix:{path}")
        assert done.status == 4
        assert f"of user {NOBODY} is neither of this agent's user nor root" in done.one_line()
        assert other.communicate(timeout=SECONDS)[0] == "0\n"  # not a byte was said
        here.runs_on()


def test_an_older_destination_is_told_apart(tmp_path):
    """A destination that speaks version 2 only cannot be handed memory: said before anything is."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{tmp_path}/old.sock")
    listening.listen(1)
    listening.settimeout(SECONDS)
    with (
        listening,
        source(tmp_path, size="8MiB") as here,
        Command("migrate", "--admin", here.admin, f"unix:{tmp_path}/old.sock") as migration,
    ):
        connection, _ = listening.accept()
        with connection:
            connection.settimeout(SECONDS)
            assert len(connection.recv(64, socket.MSG_WAITALL)) == 64
            channel = Channel(connection)
            channel.expect(Hello)
            connection.sendall(encode(Welcome(2, b"i" * 16, b"t" * 32, "an old one")))
            channel.expect(Cancel)
            done = migration.result()
        assert done.status == 4
        assert "speaks version 2 of the protocol, and memory is handed over from version 3 on" in done.one_line()
