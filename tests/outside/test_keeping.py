"""What is kept of a process, without one: what is said to be here, and what is given back where nothing can be kept."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from postcopy.errors import HostError, UsageError
from postcopy.guest.outside.keeping import Kept, Migration, read_record
from postcopy.guest.outside.message import USERFAULTFD, Given, Message
from postcopy.guest.outside.poison import Poisoner
from tests.outside.vmm import PAGE

ABSENT, PLACED, ZERO, DROPPED = 0, 3, 4, 6
MESSAGE = Message((Given(0, 3 * PAGE, 0, PAGE),), (USERFAULTFD,))


class Store:
    """It keeps nothing."""

    def keep(self, _name, _descriptors):
        pass

    def forget(self, _name):
        pass


@pytest.fixture
def connection():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours


@pytest.mark.parametrize("last", [ABSENT, DROPPED])
def test_a_page_that_was_given_back_on_its_way_is_here_and_not_lost(connection, last):
    kept = Kept.begin(Store(), MESSAGE, connection.fileno(), connection)
    try:
        os.pwrite(kept._file, bytes([PLACED, ZERO, last]), 64 << 10)
        assert (kept.here, kept.whole) == ((3, True) if last == DROPPED else (2, False))
        assert Poisoner(None, [(0, PAGE)], kept.states())._lost == [bytes([0, 0, last == ABSENT])]
    finally:
        kept.close()


def test_a_record_that_is_too_long_leaves_what_is_said_of_the_pages_alone(connection):
    kept = Kept.begin(Store(), MESSAGE, connection.fileno(), connection)
    try:
        os.pwrite(kept._file, bytes([PLACED, ABSENT, ZERO]), 64 << 10)
        with pytest.raises(HostError, match="more than 65536"):
            kept.note(Migration(3, bytes(16), bytes(32), ("file",), bytes([PLACED]) * (64 << 10)))
        assert kept.states() == [bytes([PLACED, ABSENT, ZERO])]
        assert read_record(kept._file) == (MESSAGE.mappings, None)
    finally:
        kept.close()


@pytest.mark.parametrize("memory", [b"", b"its name"])
def test_whether_somebody_paused_is_kept_and_no_older_agent_knows(connection, memory):
    kept = Kept.begin(Store(), MESSAGE, connection.fileno(), connection)
    migration = Migration(3, bytes(16), bytes(32), ("file",), memory)
    try:
        for held in (False, True, False, True):
            kept.note(replace(migration, held=held))
            assert read_record(kept._file) == (MESSAGE.mappings, replace(migration, held=held))
        (length,) = struct.unpack("<I", os.pread(kept._file, 4, 0))
        said = msgpack.unpackb(os.pread(kept._file, length, 4))
        for change, held in (({}, True), ({"held": False}, False), ({"held": 1}, None), ({"held": None}, None)):
            record = msgpack.packb(said | change)
            os.pwrite(kept._file, struct.pack("<I", len(record)) + record, 0)
            if held is None:
                with pytest.raises(UsageError, match="nothing known of its migration"):
                    read_record(kept._file)
            else:
                assert read_record(kept._file)[1].held is held
        del said["held"]
        record = msgpack.packb(said)
        os.pwrite(kept._file, struct.pack("<I", len(record)) + record, 0)
        assert read_record(kept._file) == (MESSAGE.mappings, migration)
    finally:
        kept.close()


def test_where_no_descriptor_is_left_none_stays_open(connection, monkeypatch):
    def none_left(_name):
        raise OSError(24, "Too many open files")

    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(os, "memfd_create", none_left)
    with pytest.raises(OSError, match="Too many"):
        Kept.begin(Store(), MESSAGE, connection.fileno(), connection)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
