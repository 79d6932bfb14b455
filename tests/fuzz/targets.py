"""All that reads bytes of somebody else, each as a function of bytes that sees what must be true, whatever they are.

Bytes are accepted, or refused with an error of ours that can stand in a log; what is accepted says the same once it is
written again; what any of it costs in memory is bounded.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from agent import commands
from agent.cli import cli
from agent.config import keys, read
from agent.frames import read_map
from agent.requests import judge
from postcopy import limits
from postcopy.errors import PostcopyError, ProtocolError, UsageError
from postcopy.guest.outside import keeping, message
from postcopy.guest.state import GuestState
from postcopy.link.keeping import Record
from postcopy.wire import preamble, residence
from postcopy.wire.control import ControlDecoder, Have, encode
from postcopy.wire.unpack import unpack

commands.register(cli)
KNOWN = keys.sections(cli)
GUEST = {"elements_max": limits.GUEST_ELEMENTS_MAX, "array_max": limits.GUEST_ARRAY_MAX}
# Beside a small multiple of the bytes: lists as long as may be announced, at each depth that msgpack has.
DEPTH_MAX = 1024
WORD = 8
TARGETS: dict[str, Callable[[bytes], None]] = {}


def target(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
    TARGETS[run.__name__] = run
    return run


def memory_of(work: Callable[[], object]) -> int:
    """Return the most memory that a call took."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def is_a_line(error: PostcopyError | str, *, begins: str = "") -> None:
    """See that a refusal can stand in a log."""
    assert str(error).startswith(begins)
    assert str(error).isprintable(), repr(str(error))
    assert len(str(error)) < limits.TEXT_CHARS_MAX + 20


def bounded(work: Callable[[], object], size: int, array_max: int = limits.ARRAY_MAX) -> None:
    """See that it takes no more memory than msgpack may need for so many bytes."""
    assert memory_of(work) < 64 * size + DEPTH_MAX * WORD * array_max + (1 << 20)


# --- the other agent --------------------------------------------------------------------------------------------------


def _unpacked(data: bytes, bounds: dict[str, int]) -> None:
    try:
        value = unpack(data, "it", **bounds)
    except ProtocolError as error:
        is_a_line(error, begins="it: ")
    else:
        assert repr(unpack(msgpack.packb(value), "again", **bounds)) == repr(value)


@target
def packed(data: bytes) -> None:
    bounded(lambda: _unpacked(data, {}), len(data))
    bounded(lambda: _unpacked(data, GUEST), len(data), limits.GUEST_ARRAY_MAX)


@target
def control(data: bytes) -> None:
    """The first byte says where the stream is cut into what arrives at a time."""
    step, data = 1 + (data[0] if data else 0), data[1:]

    def take() -> None:
        decoder = ControlDecoder()
        try:
            messages = [one for begin in range(0, len(data), step) for one in decoder.feed(data[begin : begin + step])]
        except ProtocolError as error:
            is_a_line(error)
            with pytest.raises(ProtocolError):
                decoder.feed(b"")
            return
        again = ControlDecoder()
        assert [one for message in messages for one in again.feed(encode(message))] == messages

    bounded(take, len(data))


@target
def preambles(data: bytes) -> None:
    for size in range(0, len(data), 7):
        try:
            preamble.check_start(data[:size])
        except ProtocolError:
            with pytest.raises(ProtocolError):
                preamble.unpack(data)
    try:
        found = preamble.unpack(data)
    except ProtocolError as error:
        is_a_line(error)
    else:
        assert preamble.pack(found) == data


@target
def guest_state(data: bytes) -> None:
    def take() -> None:
        try:
            state = GuestState.from_map(unpack(data, "the guest's state", **GUEST))
        except ProtocolError as error:
            is_a_line(error)
        else:
            assert GuestState.from_map(unpack(msgpack.packb(state.to_map()), "again", **GUEST)) == state

    bounded(take, len(data), limits.GUEST_ARRAY_MAX)


@target
def have(data: bytes) -> None:
    """Four bytes say of how many pages, the rest is what should be their bits."""
    pages = 1 + int.from_bytes(data[:4], "little") % limits.HAVE_PAGES_MAX

    def take() -> None:
        try:
            bitmap = residence.read(Have(0, 0, pages, data[4:]))
        except ProtocolError as error:
            is_a_line(error)
        else:
            (again,) = residence.tell(0, pages, iter([bitmap]))
            assert residence.read(again) == bitmap

    assert memory_of(take) < 16 * (pages // 8) + 64 * len(data) + (1 << 20)


# --- this host --------------------------------------------------------------------------------------------------------


@target
def hand_over(data: bytes) -> None:
    """What a process says when it hands its memory over, in two parts."""

    def take() -> None:
        try:
            if not message.complete(data[: len(data) // 2]):
                message.complete(data)
            found = message.parse(data)
        except ProtocolError as error:
            is_a_line(error)
            return
        is_a_line(found.describe())
        said = [
            {"base_host_virt_addr": one.address, "size": one.size, "offset": one.offset, "page_size": one.page_size}
            for one in found.mappings
        ]
        again = json.dumps({"mappings": said, "descriptors": found.descriptors}).encode()
        assert message.parse(again) == found

    assert memory_of(take) < 64 * len(data) + (1 << 20)


@target
def kept_record(data: bytes) -> None:
    """What a keeper gives to an agent that takes a killed one's place."""

    def take() -> None:
        try:
            record = Record.unpack(data)
        except UsageError as error:
            is_a_line(error)
        else:
            assert Record.unpack(record.pack()) == record

    bounded(take, len(data))


@target
def kept_header(data: bytes) -> None:
    """What systemd gives back of a process, before the page maps in its file."""
    file = os.memfd_create("a test")
    try:
        os.pwrite(file, data, 0)

        def take() -> None:
            try:
                mappings, migration = keeping.read_record(file)
            except UsageError as error:
                is_a_line(error)
            else:
                again = keeping.pack_record(mappings, migration)
                os.pwrite(file, again, 0)
                assert keeping.read_record(file) == (mappings, migration)

        bounded(take, len(data))
    finally:
        os.close(file)


@target
def configuration(data: bytes) -> None:
    """A file of settings."""
    descriptor = os.memfd_create("a test")
    try:
        os.write(descriptor, data)
        file = Path(f"/proc/self/fd/{descriptor}")
        settings, problems = read.read_file(file, KNOWN)
        for problem in problems:
            is_a_line(str(problem).replace(str(file), ""))
            assert 0 <= problem.line <= data.count(b"\n") + data.count(b"\r") + 1
        assert settings.keys() <= KNOWN.keys()
        if not problems:
            assert read.read([file], KNOWN) == settings
            read.defaults(settings, KNOWN)
    finally:
        os.close(descriptor)


async def _frames(data: bytes) -> list[dict[str, Any]]:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    found = []
    while (value := await read_map(reader)) is not None:
        found.append(value)
    return found


@target
def admin_frames(data: bytes) -> None:
    try:
        found = asyncio.run(_frames(data))
    except ProtocolError as error:
        is_a_line(error)
    else:
        assert all(isinstance(one, dict) for one in found)


@target
def admin_request(data: bytes) -> None:
    """What a daemon is asked for, behind its frame."""
    framed = struct.pack("<I", len(data)) + data

    def take() -> None:
        try:
            for request in asyncio.run(_frames(framed)):
                command, arguments = judge(request)
                assert judge({"command": command, "arguments": arguments}) == (command, arguments)
        except (ProtocolError, UsageError) as error:
            is_a_line(error)

    bounded(take, len(data), limits.ADMIN_ARRAY_MAX)
