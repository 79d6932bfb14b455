"""For each target a strategy of bytes that come close to what it reads: sound, spoiled, or alike to look at."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import msgpack
from hypothesis import strategies as st

from agent.requests import ARGUMENTS
from postcopy import limits
from postcopy.guest.outside import keeping
from postcopy.guest.outside.message import Given
from postcopy.link.keeping import Record
from postcopy.wire import preamble
from postcopy.wire.control import AllPlaced, Progress, encode
from postcopy.wire.latencies import BUCKETS
from tests.guest.test_state import sound
from tests.wire.examples import EXAMPLES

from .targets import KNOWN

Bytes = st.SearchStrategy[bytes]

# --- bytes that look like msgpack -------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 255)
LENGTHS = st.sampled_from([0, 1, 2, 15, 16, 31, 32, 255, 256, 1024, 1025, 8192, 8193, 65535, 65536, 2**31, 2**32 - 1])


def head(code: int, layout: str) -> Bytes:
    """Return a strategy of one type's code with a length behind it, which may say anything."""
    most = (1 << 8 * struct.calcsize(layout)) - 1
    return LENGTHS.map(lambda length: bytes([code]) + struct.pack(layout, min(length, most)))


TOKENS: Bytes = st.one_of(
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
PACKED: Bytes = st.lists(st.tuples(TOKENS, st.sampled_from([1, 1, 1, 1, 2, 100, 1023, 1024, 3000])), max_size=8).map(
    lambda parts: b"".join(token * times for token, times in parts)
)
# In place of it come arrays inside each other, more of them than msgpack would pack.
DEEPLY = "@deeply@"
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.just(DEEPLY),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def packed_of(values: st.SearchStrategy[Any]) -> Bytes:
    """Return a strategy of values as msgpack."""
    depths = st.sampled_from([1, 8, 31, 32, 500, 990, 1000, 1010])
    return st.builds(
        lambda value, depth: msgpack.packb(value).replace(msgpack.packb(DEEPLY), b"\x91" * depth + b"\xc0"),
        values,
        depths,
    )


def spoiled(draw: st.DrawFn, data: bytes) -> bytes:
    """Change, leave out, put in and repeat some bytes."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        stop = min(len(data), at + draw(st.integers(0, 9)))
        news = draw(st.binary(max_size=6) | TOKENS | st.just(data[at:stop] * 2))
        data = data[:at] + news + data[stop:]
    return data


@st.composite
def spoiled_now_and_then(draw: st.DrawFn, whole: Bytes) -> bytes:
    data = draw(whole)
    return spoiled(draw, data) if draw(st.integers(0, 2)) == 0 else data


@st.composite
def changed(draw: st.DrawFn, base: dict[str, Any], values: st.SearchStrategy[Any]) -> dict[str, Any]:
    """Return a map with something else in some of its fields, or without them, or with more."""
    found = dict(base)
    for name in draw(st.lists(st.sampled_from(sorted(base)), max_size=3)):
        if draw(st.integers(0, 4)) == 0:
            found.pop(name, None)
        else:
            found[name] = draw(values)
    return found


# --- the other agent --------------------------------------------------------------------------------------------------


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """Return some messages one behind the other, of which the last ones are spoiled: inside, or anywhere."""
    whole = b"".join(encode(message) for message in draw(st.lists(st.sampled_from(EXAMPLES), max_size=2)))
    message = encode(draw(st.sampled_from(EXAMPLES)))
    how = draw(st.integers(0, 2))
    if how == 0:
        return whole + prefixed(spoiled(draw, message[4:]))
    if how == 1:
        return whole + prefixed(draw(packed_of(changed(msgpack.unpackb(message[4:]), VALUES))))
    return whole + spoiled(draw, message)


# Histograms whose buckets are out of order, beyond the last, empty, too full, or not as many as their counts.
COLUMNS: Bytes = st.builds(
    lambda numbers, counts: struct.pack(f"<{len(numbers)}H{len(counts)}Q", *numbers, *counts),
    st.lists(st.integers(0, BUCKETS + 1), max_size=4).map(sorted) | st.lists(st.integers(0, 65535), max_size=4),
    st.lists(st.integers(1, 9) | st.sampled_from([0, limits.HISTOGRAM_COUNT_MAX, 2**64 - 1]), max_size=4),
)
HISTOGRAMS = changed({"buckets": b"", "sum_ns": 5, "max_ns": 5}, VALUES | COLUMNS | st.binary(max_size=40))
LATENCIES = st.fixed_dictionaries({"faults": HISTOGRAMS, "stalls": st.lists(HISTOGRAMS, max_size=18)})


@st.composite
def told(draw: st.DrawFn) -> bytes:
    """Return a message that tells of latencies."""
    example = draw(st.sampled_from([one for one in EXAMPLES if isinstance(one, Progress | AllPlaced)]))
    return prefixed(msgpack.packb(msgpack.unpackb(encode(example)[4:]) | {"latencies": draw(LATENCIES)}))


def prefixed(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


CONTROL = st.builds(
    lambda step, data: bytes([step]) + data,
    st.sampled_from([255, 254, 60, 6, 4, 3, 0]),
    conversations() | told() | PACKED.map(prefixed),
)

PREAMBLES: Bytes = st.tuples(
    st.sampled_from([preamble.PREAMBLE_MAGIC, b"POSTCOPX"]),
    st.integers(0, 5) | st.integers(0, 65535),
    st.integers(0, 6) | st.integers(0, 65535),
    st.integers(0, 2) | st.integers(0, 2**32 - 1),
    st.sampled_from([bytes(16), b"m" * 16]),
    st.sampled_from([bytes(32), b"t" * 32]),
).map(lambda fields: struct.pack("<8sHHI16s32s", *fields)) | st.binary(max_size=80)

STATES = packed_of(changed(dict(sound()), VALUES | st.integers(-1, 70) | st.just([[0, 0, 0]] * 70)))

# A kilobyte that says a megabyte, one that says 64 times as much as it may, and one that says such a one.
BOMB = zlib.compress(bytes(64 << 20))
SHRUNK = [*(zlib.compress(bytes(size)) for size in (1, 8, 4096, 1 << 20)), BOMB, zlib.compress(BOMB)]
BITS: Bytes = st.binary(max_size=64).map(zlib.compress) | st.sampled_from(SHRUNK) | st.binary(max_size=64)
PAGES = st.integers(1, 600) | st.sampled_from([1, 7, 8, 9, 512, 4096 * 8, limits.HAVE_PAGES_MAX])
HAVES = st.builds(lambda pages, bits: struct.pack("<I", pages - 1) + bits, PAGES, spoiled_now_and_then(BITS))

# --- this host --------------------------------------------------------------------------------------------------------

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
NUMBERS_OF_MEMORY = st.sampled_from([0, 1, -1, 4, 4095, 4096, 8192, 2 << 20, 2048, 1 << 30, 1 << 40, 2**63 - 1, 2**63])
MAPPING: dict[str, Any] = {"base_host_virt_addr": 1 << 32, "size": 8192, "offset": 0, "page_size": 4096}
LONG = st.just("x" * 5000) | st.just("\x1b[2J\n")
MAPPINGS = changed({**MAPPING, "page_size_kib": 4096}, NUMBERS_OF_MEMORY | JSON | LONG)
MESSAGES = st.one_of(
    st.lists(MAPPINGS, max_size=4),
    st.lists(st.just(MAPPING), min_size=63, max_size=66),
    changed(
        {"mappings": [MAPPING], "descriptors": ["userfaultfd", "memory"]},
        st.lists(MAPPINGS, max_size=3) | JSON | st.lists(st.sampled_from(["userfaultfd", "memory", "x"]), max_size=3),
    ),
    st.dictionaries(LONG, JSON, max_size=2),
)
DEEP: Bytes = st.sampled_from([b"[" * 20000, b'{"a":' * 9000, b"[" + b"9" * 5000 + b"]", b"[" * 900 + b"]" * 900])
HAND_OVERS = spoiled_now_and_then(MESSAGES.map(lambda said: json.dumps(said).encode())) | DEEP | st.binary(max_size=40)

RECORD = msgpack.unpackb(
    Record(
        version=3, migration_id=bytes(16), token=bytes(32), address="tcp:127.0.0.1:7000", elsewhere="",
        regions=(("shmem", 4096, 8192),), guest=("emulated", 2), tls=True, state=b"\x80", push=True, held=False,
        rate=None, started=1.0, stopped=2.0, stopped_at=2.5, run_sent=3.0,
    ).pack()
)  # fmt: skip
RECORDS = spoiled_now_and_then(packed_of(changed(RECORD, VALUES | NUMBERS_OF_MEMORY))) | PACKED

KEPT = (Given(1 << 32, 8192, 0, 4096), Given(2 << 32, 4 << 20, 8192, 2 << 20))
HEADER = keeping.pack_record(KEPT, keeping.Migration(3, bytes(16), bytes(32), ("shmem", "hugetlb-2M")))
FIELDS_OF_KEPT = changed(
    msgpack.unpackb(HEADER[4:]), VALUES | st.lists(st.lists(NUMBERS_OF_MEMORY, max_size=5), max_size=3)
)
HEADERS = spoiled_now_and_then(st.just(HEADER) | packed_of(FIELDS_OF_KEPT).map(prefixed)) | PACKED.map(prefixed)

SECTIONS = st.sampled_from(["[source]", "[destination]", "[demo]", "[[source]]", "[sourc]", "[a.b]", "[]"])
NAMES_OF_KEYS = st.sampled_from(sorted({key for section in KNOWN.values() for key in section}))
NUMBERS_SAID = ["1", "-1", "1e999", "nan", "0x10", "9" * 5000, "1979-05-27"]
LISTS_SAID = ["[]", "[1]", '["a", 2]', "[" * 3000, "{}", "{a = 1}"]
TEXTS_SAID = ['"4MiB"', '"unix:/x"', '"tcp:127.0.0.1:1"', '"\\u0000"', '"\\u001b[2J"', '"', "'" + "x" * 3000 + "'"]
SAID = st.sampled_from(["true", *NUMBERS_SAID, *LISTS_SAID, *TEXTS_SAID, '"""a\nb"""'])
LINES = SECTIONS | st.builds("{} = {}".format, NAMES_OF_KEYS | st.sampled_from(["x", '"\\n"', "a.b"]), SAID)
CONFIGURATIONS = spoiled_now_and_then(st.lists(LINES, max_size=6).map(lambda lines: "\n".join(lines).encode()))

REQUESTS = changed(
    {
        "command": "migrate",
        "arguments": {"to": "tcp:127.0.0.1:1", "timeout": 1.0, "push": True, "rate": None, "insecure": False},
    },
    VALUES
    | LONG
    | st.dictionaries(st.sampled_from([*ARGUMENTS, "x"]) | LONG, VALUES | NUMBERS_OF_MEMORY | LONG, max_size=3),
)
FRAMES = st.lists(PACKED | packed_of(VALUES) | st.binary(max_size=9), max_size=3)


@st.composite
def framed(draw: st.DrawFn) -> bytes:
    """Return some frames, whose lengths are not always right."""
    off = draw(st.integers(-2, 2))
    return b"".join(
        struct.pack("<I", max(0, len(one) + (off if number else 0))) + one for number, one in enumerate(draw(FRAMES))
    )


INPUTS: dict[str, Bytes] = {
    "packed": PACKED | packed_of(VALUES),
    "control": CONTROL,
    "preambles": PREAMBLES,
    "guest_state": spoiled_now_and_then(STATES) | PACKED,
    "have": HAVES,
    "hand_over": HAND_OVERS,
    "kept_record": RECORDS,
    "kept_header": HEADERS,
    "configuration": CONFIGURATIONS,
    "admin_frames": framed(),
    "admin_request": spoiled_now_and_then(packed_of(REQUESTS)) | PACKED,
}
