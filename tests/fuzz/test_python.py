"""Hostile bytes into everything in Python that reads bytes of somebody else: accepted or a ProtocolError, nothing else.

What is accepted says the same once it is encoded again, and what any of it costs in memory is bounded.
"""

from __future__ import annotations

import asyncio
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.frames import read_map
from postcopy import limits
from postcopy.errors import ProtocolError
from postcopy.guest.state import GuestState
from postcopy.wire import preamble
from postcopy.wire.control import ControlDecoder, encode
from postcopy.wire.unpack import unpack
from tests.guest.test_state import sound
from tests.wire.examples import EXAMPLES

# About a quarter of a minute in all.
THOROUGH = settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
GUEST = {"elements_max": limits.GUEST_ELEMENTS_MAX, "array_max": limits.GUEST_ARRAY_MAX}
# Beside a small multiple of the bytes: lists as long as may be announced, at each depth that msgpack has.
DEPTH_MAX = 1024
WORD = 8


def memory_of(work: Callable[[], object]) -> int:
    """Return the most memory that a call took."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def is_a_line(error: ProtocolError, *, begins: str = "") -> None:
    """See that a refusal can stand in a log."""
    assert str(error).startswith(begins)
    assert str(error).isprintable()
    assert len(str(error)) < 300


# --- bytes that look like msgpack -------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 255)
LENGTHS = st.sampled_from([0, 1, 2, 15, 16, 31, 32, 255, 256, 1024, 1025, 8192, 8193, 65535, 65536, 2**31, 2**32 - 1])


def head(code: int, layout: str) -> st.SearchStrategy[bytes]:
    """Return a strategy of one type's code with a length behind it, which may say anything."""
    most = (1 << 8 * struct.calcsize(layout)) - 1
    return LENGTHS.map(lambda length: bytes([code]) + struct.pack(layout, min(length, most)))


TOKENS = st.one_of(
    NUMBERS.map(lambda code: bytes([code])),
    st.sampled_from([b"\x90", b"\x91", b"\x80", b"\x81", b"\xc0", b"\xc2", b"\xa1t", b"\xa1\xff", b"\x81\x01"]),
    *(head(code, layout) for code, layout in ((0xD9, ">B"), (0xDA, ">H"), (0xDB, ">I"), (0xC4, ">B"), (0xC6, ">I"))),
    *(head(code, layout) for code, layout in ((0xDC, ">H"), (0xDD, ">I"), (0xDE, ">H"), (0xDF, ">I"), (0xC9, ">I"))),
    st.binary(min_size=8, max_size=8).map(lambda value: b"\xcf" + value),
    st.binary(min_size=8, max_size=8).map(lambda value: b"\xcb" + value),
    st.text(max_size=4).map(msgpack.packb),
    st.binary(max_size=6),
)
# A token many times over is what goes deep.
PACKED = st.lists(st.tuples(TOKENS, st.sampled_from([1, 1, 1, 1, 2, 100, 1023, 1024, 3000])), max_size=8).map(
    lambda parts: b"".join(token * times for token, times in parts)
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@THOROUGH
@given(PACKED | VALUES.map(msgpack.packb), st.sampled_from([{}, GUEST]))
def test_bytes_of_msgpack(payload: bytes, bounds: dict[str, int]) -> None:
    array_max = bounds.get("array_max", limits.ARRAY_MAX)

    def read() -> None:
        try:
            value = unpack(payload, "it", **bounds)
        except ProtocolError as error:
            is_a_line(error, begins="it: ")
        else:
            assert repr(unpack(msgpack.packb(value), "again", **bounds)) == repr(value)

    assert memory_of(read) < 64 * len(payload) + DEPTH_MAX * WORD * array_max + (1 << 20)


def test_a_bomb_of_nested_announcements_is_refused_cheaply() -> None:
    bomb = b"\xdd\x00\xff\xff\xff" * 3000

    def read() -> None:
        with pytest.raises(ProtocolError, match="the guest's state: not msgpack as agreed"):
            unpack(bomb, "the guest's state", **GUEST)

    assert memory_of(read) < 1 << 20
    # As long as may be announced, as deep as may be: msgpack makes room for all of them before it sees that they lie.
    deep = b"\xdd" + struct.pack(">I", limits.GUEST_ARRAY_MAX)

    def dive() -> None:
        with pytest.raises(ProtocolError):
            unpack(deep * 3000, "it", **GUEST)

    assert memory_of(dive) < DEPTH_MAX * WORD * limits.GUEST_ARRAY_MAX + (1 << 20)


# --- the control connection -------------------------------------------------------------------------------------------


def spoiled(draw: st.DrawFn, data: bytes) -> bytes:
    """Change, leave out, put in and repeat some bytes."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        stop = min(len(data), at + draw(st.integers(0, 9)))
        news = draw(st.binary(max_size=6) | TOKENS | st.just(data[at:stop] * 2))
        data = data[:at] + news + data[stop:]
    return data


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """Return some messages one behind the other, of which the last ones are spoiled: inside, or anywhere."""
    whole = b"".join(encode(message) for message in draw(st.lists(st.sampled_from(EXAMPLES), max_size=2)))
    message = encode(draw(st.sampled_from(EXAMPLES)))
    if draw(st.booleans()):
        payload = spoiled(draw, message[4:])
        return whole + struct.pack("<I", len(payload)) + payload
    return whole + spoiled(draw, message)


@THOROUGH
@given(conversations() | PACKED.map(lambda payload: struct.pack("<I", len(payload)) + payload), st.data())
def test_the_control_connection(data: bytes, choice: st.DataObject) -> None:
    cuts = sorted(choice.draw(st.lists(st.integers(0, len(data)), max_size=3)))
    pieces = [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]

    def read() -> None:
        decoder = ControlDecoder()
        try:
            messages = [message for piece in pieces for message in decoder.feed(piece)]
        except ProtocolError as error:
            is_a_line(error)
            with pytest.raises(ProtocolError):
                decoder.feed(b"")
            return
        again = ControlDecoder()
        assert [one for message in messages for one in again.feed(encode(message))] == messages

    assert memory_of(read) < 64 * len(data) + DEPTH_MAX * WORD * limits.ARRAY_MAX + (1 << 20)


# --- preambles --------------------------------------------------------------------------------------------------------

FIELDS = st.tuples(
    st.sampled_from([preamble.PREAMBLE_MAGIC, b"POSTCOPX"]),
    st.integers(0, 5) | st.integers(0, 65535),
    st.integers(0, 6) | st.integers(0, 65535),
    st.integers(0, 2) | st.integers(0, 2**32 - 1),
    st.sampled_from([bytes(16), b"m" * 16]),
    st.sampled_from([bytes(32), b"t" * 32]),
)


@THOROUGH
@given(FIELDS.map(lambda fields: struct.pack("<8sHHI16s32s", *fields)) | st.binary(max_size=80))
def test_preambles(data: bytes) -> None:
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


# --- admin frames -----------------------------------------------------------------------------------------------------


async def read_frames(data: bytes) -> list[dict[str, Any]]:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    found = []
    while (value := await read_map(reader)) is not None:
        found.append(value)
    return found


@settings(THOROUGH, max_examples=700)
@given(st.lists(PACKED | VALUES.map(msgpack.packb) | st.binary(max_size=9), max_size=3), st.integers(-2, 2))
def test_admin_frames(payloads: list[bytes], off: int) -> None:
    framed = [struct.pack("<I", max(0, len(one) + (off if number else 0))) + one for number, one in enumerate(payloads)]
    try:
        found = asyncio.run(read_frames(b"".join(framed)))
    except ProtocolError as error:
        is_a_line(error)
    else:
        assert all(isinstance(one, dict) for one in found)


# --- the guest's state ------------------------------------------------------------------------------------------------


@st.composite
def states(draw: st.DrawFn) -> bytes:
    """Return a sound state with something else in some fields, and spoiled bytes now and then."""
    state = dict(sound())
    for name in draw(st.lists(st.sampled_from(sorted(state)), max_size=3)):
        state[name] = draw(VALUES | st.integers(-1, 70) | st.just([[0, 0, 0]] * 70))
    data: bytes = msgpack.packb(state)
    return spoiled(draw, data) if draw(st.booleans()) else data


@THOROUGH
@given(states() | PACKED)
def test_the_state_of_a_guest(data: bytes) -> None:
    def read() -> None:
        try:
            state = GuestState.from_map(unpack(data, "the guest's state", **GUEST))
        except ProtocolError as error:
            is_a_line(error)
        else:
            assert GuestState.from_map(unpack(msgpack.packb(state.to_map()), "again", **GUEST)) == state

    assert memory_of(read) < 64 * len(data) + DEPTH_MAX * WORD * limits.GUEST_ARRAY_MAX + (1 << 20)
