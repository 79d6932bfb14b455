"""Latencies in PROGRESS and ALL_PLACED: what is taken, what is refused, and that the most there may be fits."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy import limits
from postcopy.errors import ProtocolError
from postcopy.wire.control import AllPlaced, ControlDecoder, Hello, Message, Progress, encode
from postcopy.wire.fields import IllTypedError
from postcopy.wire.latencies import BUCKETS, NOTHING, Buckets, Latencies, SparseHistogram
from tests.wire.examples import LATENCIES, read, wire

MOST = limits.HISTOGRAM_COUNT_MAX
NUMBERS = f"wanted rising numbers of buckets from 0 to {BUCKETS - 1}"
COUNTS = f"wanted counts from 1 to {MOST}"
SIZE = f"wanted 10 bytes for each of 0 to {BUCKETS} buckets"


def decoded(data: bytes, version: int = 3) -> Message:
    decoder = ControlDecoder(version)
    decoder.feed(encode(Hello((2, 3), "x")))
    (message,) = decoder.feed(data)
    return message


def columns(numbers: list[int], counts: list[int]) -> bytes:
    """Return bytes that follow no rule but how many they are."""
    return struct.pack(f"<{len(numbers)}H{len(counts)}Q", *numbers, *counts)


def test_numbers_come_before_counts_in_little_endian() -> None:
    assert Buckets().give(((1, 2), (258, 3))) == bytes([1, 0, 2, 1, 2, *bytes(7), 3, *bytes(7)])


BAD = {
    "out of order": (columns([5, 4], [1, 1]), NUMBERS),
    "twice the same": (columns([5, 5], [1, 1]), NUMBERS),
    "beyond the last": (columns([BUCKETS], [1]), NUMBERS),
    "nothing in it": (columns([5, 6], [1, 0]), COUNTS),
    "more than can be added up": (columns([5, 6], [MOST + 1, 1]), COUNTS),
    "a number without its count": (columns([5, 6], [1]), SIZE),
    "a byte too many": (columns([5], [1]) + b"\0", SIZE),
    "more than there are": (bytes(10 * (BUCKETS + 1)), SIZE),
    "pairs": ([[5, 1]], SIZE),
    "nothing": (None, SIZE),
}


@pytest.mark.parametrize(("said", "text"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("example", [Progress(1, 2, 3, LATENCIES), AllPlaced({}, LATENCIES)], ids=["progress", "all"])
def test_buckets_that_are_refused(example: Message, said: object, text: str) -> None:
    values = read(encode(example))
    name = values["t"]
    bad = {"buckets": said, "sum_ns": 1, "max_ns": 1}
    good = {"buckets": b"", "sum_ns": 1, "max_ns": 1}
    with pytest.raises(ProtocolError) as raised:
        decoded(wire(values | {"latencies": {"faults": bad, "stalls": []}}))
    assert str(raised.value) == f"message {name}: field latencies: field faults: field buckets: {text}"
    with pytest.raises(ProtocolError) as raised:
        decoded(wire(values | {"latencies": {"faults": good, "stalls": [good, bad]}}))
    assert str(raised.value) == f"message {name}: field latencies: field stalls: entry 1: field buckets: {text}"


@pytest.mark.parametrize("value", [-1, 1 << 64, 1.0, True, None])
@pytest.mark.parametrize("name", ["sum_ns", "max_ns"])
def test_sums_and_longest_times_are_whole_numbers(name: str, value: object) -> None:
    values = read(encode(Progress(1, 2, 3)))
    histogram = {"buckets": b"", "sum_ns": 0, "max_ns": 0, name: value}
    with pytest.raises(ProtocolError, match="latencies: "):
        decoded(_packed_or_refused(values | {"latencies": {"faults": histogram, "stalls": []}}))


def _packed_or_refused(values: dict[str, object]) -> bytes:
    try:
        return wire(values)
    except OverflowError:
        raise ProtocolError("latencies: msgpack has no such number") from None


def test_there_are_no_more_vcpus_than_are_told_of() -> None:
    many = Latencies(stalls=(SparseHistogram(),) * (limits.HISTOGRAM_VCPUS_MAX + 1))
    with pytest.raises(ValueError, match=f"field stalls: wanted 0 to {limits.HISTOGRAM_VCPUS_MAX}"):
        encode(Progress(1, 2, 3, many))
    values = read(encode(Progress(1, 2, 3)))
    one = {"buckets": b"", "sum_ns": 0, "max_ns": 0}
    with pytest.raises(ProtocolError, match=f"field stalls: wanted an array of 0 to {limits.HISTOGRAM_VCPUS_MAX}"):
        decoded(wire(values | {"latencies": {"faults": one, "stalls": [one] * (limits.HISTOGRAM_VCPUS_MAX + 1)}}))


def test_the_most_there_may_be_is_read_ahead_of_the_machine() -> None:
    full = SparseHistogram(tuple((number, MOST) for number in range(BUCKETS)), (1 << 64) - 1, (1 << 64) - 1)
    message = Progress(1, 2, 3, Latencies(full, (full,) * limits.HISTOGRAM_VCPUS_MAX))
    data = encode(message)
    assert len(data) < limits.BYTES_AHEAD_MAX
    assert decoded(data) == message
    assert BUCKETS * MOST < 1 << 63, "added up they are a word with a sign"


@given(st.lists(st.tuples(st.integers(-2, BUCKETS + 1), st.integers(-1, MOST + 1)), max_size=5))
def test_what_is_said_is_what_is_taken(pairs: list[tuple[int, int]]) -> None:
    numbers = [number for number, _ in pairs]
    sound = numbers == sorted(set(numbers)) and all(0 <= n < BUCKETS and 1 <= c <= MOST for n, c in pairs)
    if sound:
        assert Buckets().take(Buckets().give(tuple(pairs))) == tuple(pairs)
    else:
        with pytest.raises(IllTypedError):
            Buckets().give(tuple(pairs))


@pytest.mark.parametrize("message", [Progress(1, 2, 3, LATENCIES), AllPlaced({}, LATENCIES)])
def test_they_are_new_in_version_3(message: Progress | AllPlaced) -> None:
    old = encode(message, version=2)
    assert "latencies" not in read(old)
    known = decoded(old, version=2)
    assert isinstance(known, Progress | AllPlaced)
    assert known.latencies == NOTHING
    with pytest.raises(ProtocolError, match="field latencies is missing"):
        decoded(old)
    with pytest.raises(ProtocolError, match="unknown field 'latencies'"):
        decoded(encode(message), version=2)
