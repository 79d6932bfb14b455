"""The README is the specification: its tables, texts and bytes are what the code says and does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import postcopy.wire
from postcopy import limits
from postcopy.errors import ProtocolError
from postcopy.pages import Layout, Region
from postcopy.wire import frame, preamble, version
from postcopy.wire.control import ControlDecoder, Hello, Run, encode
from postcopy.wire.frame import Direction, FrameRefusal, FrameType, Header
from postcopy.wire.latencies import BUCKETS, Latencies, SparseHistogram
from postcopy.wire.messages import MESSAGES, REFUSE_CODES, SINCE, GuestOffer, LayoutOffer, RegionOffer
from postcopy.wire.preamble import Preamble, Role
from tests.wire.examples import prefixed, wire

README = (Path(postcopy.wire.__file__).parent / "README.md").read_text()
ID, TOKEN = bytes(range(16)), bytes(range(0xA0, 0xC0))


def table(*heads: str) -> list[list[str]]:
    """Return the rows of the one table that begins with these heads."""
    lines = README.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("| " + " | ".join(heads) + " |")]
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def numbered(rows: list[list[str]]) -> dict[str, int]:
    return {name: int(number) for number, name, *_ in rows}


def test_roles() -> None:
    assert numbered(table("role", "name")) == {role.name.lower(): role.value for role in Role}


def test_frame_types_and_where_they_go() -> None:
    rows = table("type", "name")
    assert numbered(rows) == {kind.name: kind.value for kind in FrameType}
    said: dict[Direction, set[FrameType]] = {direction: set() for direction in Direction}
    for _, name, on, to, *_ in rows:
        for connection in filter(None, on.split(", ")):
            if to != "source":
                said[Direction[connection.upper()]].add(FrameType[name])
            if to != "destination":
                said[Direction.TO_SOURCE if connection == "urgent" else Direction.PUSH_TO_SOURCE].add(FrameType[name])
    assert said == {direction: set(direction.value) for direction in Direction}


def test_refusals_of_frames_in_order_with_their_texts() -> None:
    layout = Layout((Region(0, "shmem", 4096, 1 << 20),))
    wrong = {
        "MAGIC": Header(2, 0, 0, 4096, magic=0x4547),
        "TYPE": Header(9, 0, 0, 4096),
        "RESERVED": Header(2, 0, 0, 4096, flags=1),
        "REGION": Header(2, 7, 0, 4096),
        "ALIGNMENT": Header(2, 0, 0x1001, 4096),
        "LIMIT": Header(2, 0, 0, 0x400000),
        "RANGE": Header(2, 0, 0x100000, 4096),
    }
    rows = table("number", "reason")
    assert numbered(rows) | {"OK": 0} == {reason.name: reason.value for reason in FrameRefusal}
    assert [name for _, name, *_ in rows] == list(wrong)
    for _, name, _, text in rows:
        with pytest.raises(ProtocolError, match="frame refused") as raised:
            frame.validate(wrong[name], layout, Direction.PUSH)
        assert str(raised.value) == f"frame refused: {text}"


@pytest.mark.parametrize("earlier", range(7))
def test_each_check_comes_before_those_below_it(earlier: int) -> None:
    """A header with everything wrong from one row on is refused by that row."""
    order = [name for _, name, *_ in table("number", "reason")]
    layout = Layout((Region(0, "shmem", 4096, 1 << 20),))
    header = Header(2, 7, 0x400001, 0x400001, magic=0, flags=1)
    header = header._replace(type=9)
    mend = {
        "MAGIC": {"magic": 0x5043},
        "TYPE": {"type": 2},
        "RESERVED": {"flags": 0},
        "REGION": {"region": 0},
        "ALIGNMENT": {"offset": 0x400000, "length": 0x400000},
        "LIMIT": {"length": 4096},
    }
    for name in order[:earlier]:
        header = header._replace(**mend[name])
    assert frame.refusal(header, layout, Direction.PUSH).name == order[earlier]


def test_messages_and_their_fields() -> None:
    rows = table("message", "to")
    assert [name for name, *_ in rows] == list(MESSAGES)
    for name, _, text in rows:
        # "a: array of maps (b: name), c: whole": the names outside of brackets
        said = re.findall(r"(\w+): ", re.sub(r"\([^)]*\)|\[[^]]*\]", "", text))
        assert said == [field.name for field in fields(MESSAGES[name])], name
        nested = re.findall(r"\(([^)]*)\)", text)
        if name == "layout_offer":
            assert [re.findall(r"(\w+): ", part) for part in nested] == [
                [field.name for field in fields(shape)] for shape in (RegionOffer, GuestOffer)
            ]
        if name == "progress":
            assert [re.findall(r"(\w+): ", part) for part in nested] == [[field.name for field in fields(Latencies)]]
            assert f"array of 0 to {limits.HISTOGRAM_VCPUS_MAX} histograms" in text


def test_what_a_histogram_is() -> None:
    (line,) = [line for line in README.splitlines() if line.startswith("- *histogram*: a map of ")]
    said = line.partition(". ")[0].partition("a map of ")[2]
    assert re.findall(r"(\w+): ", said) == [field.name for field in fields(SparseHistogram)]
    assert f"There are {BUCKETS} buckets" in line


def test_words_of_refuse() -> None:
    (line,) = [line for line in README.splitlines() if line.startswith("- The code of refuse is one of: ")]
    assert tuple(re.findall(r"`(\w+)`", line)) == REFUSE_CODES


def test_limits() -> None:
    said = {name: int(value) for name, value, _ in table("limit", "value")}
    assert said == {name: getattr(limits, name) for name in said}
    room = Path(postcopy.wire.__file__).parent
    used = {name for path in room.glob("*.py") for name in re.findall(r"\b[A-Z_]+\b", path.read_text())}
    assert said.keys() == used & vars(limits).keys() | {"GUEST_ELEMENTS_MAX", "GUEST_ARRAY_MAX"}


def test_versions() -> None:
    rows = table("version", "what is new")
    assert [int(number) for number, _ in rows] == list(range(1, version.VERSION + 1))
    news = {name: int(number) for number, text in rows for name in MESSAGES if name.upper() in text}
    assert news == SINCE


def test_layouts_of_bytes() -> None:
    """The byte ranges of both tables lie end to end and as long as the code's structures."""
    lines = README.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("| bytes | field |")]
    lengths = []
    for start in starts:
        stop = 0
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            first, _, last = line.split("|")[1].strip().partition("\N{EN DASH}")
            assert int(first) == stop, line
            stop = int(last or first) + 1
        lengths.append(stop)
    assert lengths == [preamble.PREAMBLE_BYTES, frame.HEADER_BYTES]


def test_the_worked_conversation() -> None:
    said = {name: bytes.fromhex(data) for name, data in re.findall(r"```hex (\S+)\n(.*?)```", README, re.DOTALL)}
    assert said == {
        "control-preamble": preamble.pack(Preamble(Role.CONTROL, version.VERSION_MIN)),
        "hello": encode(Hello((version.VERSION_MIN, version.VERSION), "postcopy 0.1.0")),
        "urgent-preamble": preamble.pack(Preamble(Role.URGENT, version.VERSION, ID, TOKEN)),
        "urgent-preamble-tls": preamble.pack(
            Preamble(Role.URGENT, version.VERSION, ID, security=preamble.Security.TLS)
        ),
        "urgent-identity": preamble.psk_identity(Role.URGENT, ID).encode(),
        "run": encode(Run()),
        "request": frame.pack(Header(FrameType.REQUEST, 0, 0x3000, 4096)),
        "pages": frame.pack(Header(FrameType.PAGES, 0, 0x3000, 4096)),
        "zero": frame.pack(Header(FrameType.ZERO, 0, 0x3000, 4096)),
    }
    assert (preamble.ACCEPTED, preamble.FILES) == (b"\x06", b"\x46")
    (alert,) = re.findall(r"handshake_failure, `([0-9a-f ]+)`", README)
    assert bytes.fromhex(alert) == preamble.NO_TLS


def patched(at: int, value: int, role: Role = Role.PUSH) -> bytes:
    data = bytearray(preamble.pack(Preamble(role, version.VERSION, ID, TOKEN)))
    data[at] = value
    return bytes(data)


def reason_of(data: bytes, *, first: bool = False, agreed: int = 3) -> str:
    """Return why a control connection is closed on which these bytes come, as first or as second message."""
    decoder = ControlDecoder(agreed)
    if not first:
        decoder.feed(encode(Hello((2, 3), "x")))
    try:
        for message in decoder.feed(data):
            if isinstance(message, LayoutOffer):
                message.layout()
        decoder.end()
    except ProtocolError as error:
        return str(error)
    return "not refused"


def preamble_reason(data: bytes) -> str:
    with pytest.raises(ProtocolError) as raised:
        preamble.unpack(data)
    return str(raised.value)


def test_texts_of_refusals() -> None:
    region = {"type": "shmem", "page_size": 12288, "size": 12288}
    offer = {"t": "layout_offer", "guest": {"kind": "x", "vcpus": 1}, "data": [], "memory": "sent"}
    happens = [
        preamble_reason(b"GET / HTTP/1.1\r\n"),
        preamble_reason(patched(8, 2)[:13]),
        preamble_reason(patched(8, 9)),
        preamble_reason(patched(10, 7)),
        preamble_reason(patched(12, 2)),
        preamble_reason(preamble.pack(Preamble(Role.CONTROL, 2, security=preamble.Security.TLS))),
        preamble_reason(patched(10, 1)),
        preamble_reason(preamble.pack(Preamble(Role.FETCH, 2))),
        preamble_reason(patched(12, 1)),
        preamble_reason(preamble.pack(Preamble(Role.PUSH, version.VERSION))),
        reason_of(bytes(4)),
        reason_of((limits.CONTROL_BYTES_MAX + 1).to_bytes(4, "little"), first=True),
        reason_of(b"\x07\x00\x00"),
        reason_of(prefixed(b"\x81\xa1t")),
        reason_of(wire([])),
        reason_of(prefixed(b"\x82\xa1t\xa5ready\xa1t\xa5ready")),
        reason_of(wire([[0] * 1000] * 9)),
        reason_of(wire({"t": "greetings"})),
        reason_of(wire(offer | {"regions": [region]}), agreed=2),
        reason_of(wire({"t": "run", "now": 1})),
        reason_of(wire({"t": "running"})),
        reason_of(wire({"t": "hello", "versions": [2, 1], "software": "x"})),
        reason_of(wire(offer | {"regions": [region | {"page_size": 1}]})),
        reason_of(wire(offer | {"regions": [region]})),
    ]
    said = [text.split("`")[0] for _, text in table("of", "text")]
    assert len(said) == len(happens)
    for wanted, text in zip(said, happens, strict=True):
        assert (re.sub(r"\(.*\)$", "(…)", text) if wanted.endswith("(…)") else text) == wanted
