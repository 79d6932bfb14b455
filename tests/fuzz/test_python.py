"""Hostile bytes into all Python that reads bytes of somebody else: what was found before, and something new."""

from __future__ import annotations

import struct
from pathlib import Path

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings

from postcopy import limits
from postcopy.errors import ProtocolError
from postcopy.wire.unpack import unpack

from .inputs import HEADER, INPUTS
from .targets import DEPTH_MAX, GUEST, TARGETS, WORD, memory_of

CORPUS = Path(__file__).parent / "said"
CORPUS_BYTES_MAX = 1 << 20
EXAMPLES = 500

MIGRATE = msgpack.packb({"command": "migrate", "arguments": {"to": "tcp:127.0.0.1:1", "push": True}})


def deep(packed: bytes, name: bytes, value: bytes, *, prefixed: bool = False) -> bytes:
    """Have an array in an array, a thousand times, in place of a value."""
    found = packed.replace(name + value, name + b"\x91" * 1000 + b"\xc0")
    assert found != packed
    return struct.pack("<I", len(found)) + found if prefixed else found


# What once came to no good end, and is not told from other inputs by the lines that it reaches.
FOUND = {
    "nested deeper than the parser goes, and nothing behind it": ("hand_over", b"[" * 20000),
    "a list where a number of bytes is compared": (
        "hand_over",
        b'[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096,"page_size_kib":[]}]',
    ),
    "pages of a refusal": (
        "hand_over",
        b'[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096,"page_size_kib":"%s"}]' % (b"x" * 9000),
    ),
    "a list of settings that is nested too deep": ("configuration", b"size = " + b"[" * 3000),
    "a number of 5000 digits": ("configuration", b"size = " + b"9" * 5000),
    "a section whose name is no line": ("configuration", b'"\\n" = {}'),
    "a record that announces more than there is memory for": ("kept_record", b"\xdd\x00\xff\xff\xff" * 1000),
    "a header that announces 4 GiB": ("kept_header", b"\xff\xff\xff\xff\xc0"),
    "a value that is nested deeper than it can be shown": ("packed", b"\x91" * 1024 + b"\xcb" + bytes(8)),
    "a message whose type is": ("control", b"\xff" + struct.pack("<I", 1004) + b"\x81\xa1t" + b"\x91" * 1000 + b"\xc0"),
    "a header whose version is": ("kept_header", deep(HEADER[4:], b"version", b"\x01", prefixed=True)),
    "a request whose argument is": ("admin_request", deep(MIGRATE, b"push", b"\xc3")),
    "arguments that are no map": ("admin_request", b"\x82\xa7command\xa6status\xa9arguments\x91\x01"),
}

PARTS = sorted(TARGETS)


def test_there_is_something_to_begin_with_for_each_target() -> None:
    assert INPUTS.keys() == TARGETS.keys()
    assert [path.name for path in sorted(CORPUS.iterdir())] == PARTS
    assert sum(one.stat().st_size for one in CORPUS.rglob("*") if one.is_file()) < CORPUS_BYTES_MAX


@pytest.mark.parametrize("name", PARTS)
def test_what_was_found_before_comes_to_a_good_end(name: str) -> None:
    inputs = sorted((CORPUS / name).iterdir())
    assert len(inputs) >= 3
    for one in inputs:
        TARGETS[name](one.read_bytes())


@pytest.mark.parametrize(("name", "data"), FOUND.values(), ids=FOUND)
def test_what_was_mended_stays_so(name: str, data: bytes) -> None:
    TARGETS[name](data)


@pytest.mark.parametrize("name", PARTS)
def test_something_new_comes_to_a_good_end(name: str) -> None:
    thorough = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    thorough(given(INPUTS[name])(TARGETS[name]))()


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
