"""Control messages: there and back however the bytes are cut, and a ProtocolError for everything else."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy import limits
from postcopy.errors import ProtocolError
from postcopy.pages import Layout, Region
from postcopy.wire import control
from postcopy.wire.control import ControlDecoder, Message, encode
from postcopy.wire.messages import MESSAGES as SHAPES
from postcopy.wire.version import VERSION
from tests.wire.examples import EXAMPLES, MESSAGES, prefixed, read, wire

HELLO = encode(EXAMPLES[0])


def decode(data: bytes, version: int = VERSION) -> Message:
    """Decode one message that is not the first of its connection."""
    decoder = ControlDecoder(version)
    decoder.feed(HELLO)
    (message,) = decoder.feed(data)
    decoder.end()
    return message


def refused(data: bytes) -> str:
    """Return why these bytes, as second message, are refused."""
    decoder = ControlDecoder()
    decoder.feed(HELLO)
    with pytest.raises(ProtocolError) as raised:
        decoder.feed(data)
    text = str(raised.value)
    assert text.isprintable(), "one line of a log"
    assert len(text) < 300
    with pytest.raises(ProtocolError) as again:
        decoder.feed(HELLO)
    assert again.value is raised.value, "a broken decoder stays broken"
    return text


def test_there_is_an_example_of_each() -> None:
    assert [type(example) for example in EXAMPLES] == list(SHAPES.values())


def test_welcome_is_written_in_the_version_it_agrees_on() -> None:
    # the reader of the first answer does not know yet what the other agent speaks
    older = control.Welcome(VERSION - 1, bytes(range(16)), bytes(range(32)), "postcopy")
    assert b"pieces" not in encode(older)
    assert decode(encode(older)) == older
    assert b"pieces" in encode(control.Welcome(VERSION, bytes(range(16)), bytes(range(32)), "postcopy"))


@given(MESSAGES)
def test_there_and_back(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.lists(MESSAGES, max_size=5), st.data())
def test_any_cut_gives_the_same_messages(messages: list[Message], data: st.DataObject) -> None:
    stream = HELLO + b"".join(map(encode, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder = ControlDecoder()
    pieces = [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert [message for piece in pieces for message in decoder.feed(piece)] == [EXAMPLES[0], *messages]
    decoder.end()


def test_byte_by_byte_a_message_is_there_with_its_last_byte() -> None:
    decoder = ControlDecoder()
    for message in EXAMPLES:
        data = encode(message)
        for byte in data[:-1]:
            assert decoder.feed(bytes([byte])) == []
        assert decoder.feed(data[-1:]) == [message]


@settings(max_examples=300)
@given(st.binary(max_size=64))
def test_any_bytes_end_in_messages_or_a_protocol_error(data: bytes) -> None:
    for stream in (data, prefixed(data), prefixed(b"\x82\xa1t" + data), HELLO + data):
        with contextlib.suppress(ProtocolError):
            ControlDecoder().feed(stream)


@settings(max_examples=300)
@given(st.sampled_from(EXAMPLES), st.data())
def test_a_message_with_bytes_changed(message: Message, data: st.DataObject) -> None:
    payload = bytearray(encode(message)[4:])
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        changed = decode(prefixed(bytes(payload)))
    except ProtocolError:
        return
    assert decode(encode(changed)) == changed, "what is let in could have been said by this agent"


@given(st.sampled_from(EXAMPLES), st.data())
def test_a_field_less_or_more_or_of_another_type(message: Message, data: st.DataObject) -> None:
    values = read(encode(message))
    name = values["t"]
    assert refused(wire(values | {"more": 1})) == f"message {name}: unknown field 'more'"
    fields = [field for field in values if field != "t"]
    if not fields:
        return
    field = data.draw(st.sampled_from(fields))
    less = {key: value for key, value in values.items() if key != field}
    assert refused(wire(less)) == f"message {name}: field {field} is missing"
    for strange in (None, True, [], {}, -1, 1.5, float("nan"), "\n", b"", {"a": float("inf")}, ["a"]):
        # Of the right type, these two are fine here and there: a map in a report, a negative time.
        if type(strange) is not type(values[field]) or field in {"versions", "regions", "software", "code"}:
            assert refused(wire(values | {field: strange})).startswith(f"message {name}: field {field}: ")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"t": "hello", "versions": [2, 1]}, "message hello: field versions: wanted the lowest version first"),
        ({"t": "hello", "versions": [0, 1]}, "message hello: field versions: wanted a whole number from 1 to 65535"),
        ({"t": "hello", "versions": [1, 2, 3]}, "message hello: field versions: wanted the lowest and the highest"),
        ({"t": "hello", "software": "a\nb"}, "message hello: field software: wanted 1 to 64 printable characters"),
        ({"t": "hello", "software": "a" * 65}, "message hello: field software: wanted 1 to 64 printable"),
        ({"t": "welcome", "token": bytes(31)}, "message welcome: field token: wanted 32 bytes"),
        ({"t": "welcome", "token": "a" * 32}, "message welcome: field token: wanted 32 bytes"),
        ({"t": "refuse", "code": "mood"}, "message refuse: field code: wanted one of version, layout"),
        ({"t": "refuse", "text": "a" * 1001}, "message refuse: field text: wanted at most 1000 printable"),
        ({"t": "layout_offer", "regions": []}, "message layout_offer: field regions: wanted an array of 1 to 64"),
        ({"t": "layout_offer", "data": 7}, "message layout_offer: field data: wanted an array of 0 to 64"),
        ({"t": "layout_offer", "data": [0] * 65}, "message layout_offer: field data: wanted an array of 0 to 64"),
        ({"t": "layout_offer", "data": [-1]}, "message layout_offer: field data: wanted a whole number from 0"),
        ({"t": "layout_offer", "data": [True]}, "message layout_offer: field data: wanted a whole number from 0"),
        ({"t": "layout_offer", "regions": [1]}, "message layout_offer: field regions: entry 0: wanted a map"),
        ({"t": "layout_offer", "guest": {"kind": "x"}}, "message layout_offer: field guest: field vcpus is missing"),
        ({"t": "running", "first_instruction_at": 13}, "message running: field first_instruction_at: wanted a finite"),
        (
            {"t": "running", "first_instruction_at": float("nan")},
            "message running: field first_instruction_at: wanted a finite",
        ),
        ({"t": "progress", "faults": True}, "message progress: field faults: wanted a whole number from 0"),
        ({"t": "progress", "faults": -1}, "message progress: field faults: wanted a whole number from 0"),
        ({"t": "all_placed", "report": {"a": b"x"}}, "message all_placed: field report: wanted what JSON can say"),
        ({"t": "all_placed", "report": {b"a": 1}}, "message all_placed: field report: wanted texts as keys"),
        ({"t": "all_placed", "report": {"a": [float("inf")]}}, "message all_placed: field report: wanted a finite"),
        ({"t": "all_placed", "report": []}, "message all_placed: field report: wanted a map"),
    ],
)
def test_what_each_field_may_hold(change: dict[str, object], text: str) -> None:
    values = next(read(encode(example)) for example in EXAMPLES if SHAPES[str(change["t"])] is type(example))
    assert refused(wire(values | change)).startswith(text)


def nested(depth: int) -> dict[str, object]:
    value: object = 1
    for _ in range(depth - 1):
        value = [value]
    return {"a": value}


def test_depth_of_a_report() -> None:
    assert decode(encode(control.AllPlaced(nested(limits.REPORT_DEPTH_MAX))))
    with pytest.raises(ValueError, match="message all_placed: field report: wanted at most 8 maps"):
        encode(control.AllPlaced(nested(limits.REPORT_DEPTH_MAX + 1)))
    assert "wanted at most 8 maps" in refused(wire({"t": "all_placed", "report": nested(limits.REPORT_DEPTH_MAX + 1)}))


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"\xc0", "control message refused: wanted a map"),
        (b"\x80", "control message refused: unknown type None"),
        (b"\x81\xa1t\x01", "control message refused: unknown type 1"),
        (b"\x81\xa1t\xa3bye", "control message refused: unknown type 'bye'"),
        (b"\x81\xa1t\xda\x10\x00" + b"x" * 4096, "control message refused: unknown type 'xxxxx"),
        (b"\x82\xa1t\xa5ready\xa1t\xa5ready", "control message refused: a map holds a key twice"),
        (
            b"\x81\xa1t\xa5ready\x00",
            "control message refused: not msgpack as agreed ('unpack(b) received extra data.')",
        ),
        (b"\x81\x01\x02", "control message refused: not msgpack as agreed ('int is not allowed for map key"),
        (b"\x81\xa1t", "control message refused: not msgpack as agreed ('Unpack failed: incomplete input')"),
        (b"\xc1", "control message refused: not msgpack as agreed"),
        (b"\x81\xa1t\xa2\xff\xff", "control message refused: not msgpack as agreed (\"'utf-8' codec"),
        (b"\xd6\xff\x00\x00\x00\x00", "control message refused: not msgpack as agreed ('"),
        (b"\xdd\xff\xff\xff\xff", "control message refused: not msgpack as agreed ('4294967295 exceeds max_array_len"),
        (b"\xdc\x04\x01" + bytes(1025), "control message refused: not msgpack as agreed ('1025 exceeds max_array_len"),
        (b"\xde\x04\x01" + bytes(2050), "control message refused: not msgpack as agreed ('1025 exceeds max_map_len"),
        (b"\xdf\xff\xff\xff\xff", "control message refused: not msgpack as agreed ('4294967295 exceeds max_map_len"),
        (b"\xdb\xff\xff\xff\xff", "control message refused: not msgpack as agreed ("),
        (b"\xc6\xff\xff\xff\xff", "control message refused: not msgpack as agreed ("),
        (b"\x91" * 100_000, "control message refused: not msgpack as agreed ("),
        (b"\x81\xa1t" * 100_000, "control message refused: not msgpack as agreed ("),
        (b"\xdc\x04\x00" * 50_000, "control message refused: not msgpack as agreed ("),
    ],
)
def test_what_is_no_message(payload: bytes, text: str) -> None:
    assert refused(prefixed(payload)).startswith(text)


def test_a_message_of_very_many_small_things_costs_little() -> None:
    array = b"\xdc\x04\x00" + b"\x90" * 1024
    bomb = prefixed(b"\x82\xa1t\xaaall_placed\xa6report\x81\xa1a" + b"\xdc\x04\x00" + array * 1024)
    tracemalloc.start()
    assert refused(bomb) == "control message refused: more than 8192 elements"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(bomb) + (1 << 20)


def test_lengths_are_judged_before_their_bytes_come() -> None:
    first = ControlDecoder()
    with pytest.raises(ProtocolError, match="control message of 8193 bytes: the limit is 8192 here"):
        first.feed(struct.pack("<I", limits.FIRST_BYTES_MAX + 1))
    with pytest.raises(ProtocolError, match="control message of no bytes"):
        ControlDecoder().feed(bytes(4))
    assert refused(struct.pack("<I", limits.CONTROL_BYTES_MAX + 1)).endswith("the limit is 16777216 here")
    assert "the limit is 16777216" in refused(b"GET / HTTP/1.1\r\n")


def test_the_largest_state() -> None:
    room = limits.CONTROL_BYTES_MAX - 1024
    state = control.State(bytes(room), 1.0, "b" * 64)
    data = encode(state)
    assert len(data) <= limits.CONTROL_BYTES_MAX + 4
    decoder = ControlDecoder()
    decoder.feed(HELLO)
    assert [message for at in range(0, len(data), 1 << 16) for message in decoder.feed(data[at : at + (1 << 16)])] == [
        state
    ]
    with pytest.raises(ValueError, match="message state: field guest: wanted 0 to"):
        encode(control.State(bytes(room + 1), 1.0, "b"))


@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_a_connection_that_ends_inside_a_message(size: int) -> None:
    decoder = ControlDecoder()
    decoder.feed(HELLO + HELLO[:size])
    with pytest.raises(ProtocolError, match=f"ended inside a control message, {size} bytes of it came"):
        decoder.end()


def test_how_memory_gets_there_is_new_in_version_3() -> None:
    regions = (control.RegionOffer("shmem", 4096, 8192),)
    offer = control.LayoutOffer(regions, control.GuestOffer("emulated", 2), (4096,), "handed-over")
    received = decode(encode(offer))
    assert isinstance(received, control.LayoutOffer)
    assert received.handed_over
    old = encode(offer, version=2)
    assert read(old).keys() == {"t", "regions", "guest", "data"}
    known = decode(old, version=2)
    assert isinstance(known, control.LayoutOffer)
    assert not known.handed_over
    with pytest.raises(ProtocolError, match="message layout_offer: unknown field 'memory'"):
        decode(encode(offer), version=2)
    with pytest.raises(ProtocolError, match="message layout_offer: field memory is missing"):
        decode(old, version=3)
    assert [name for name, shape in SHAPES.items() if not control.speaks(shape, 2)] == ["resume", "have", "alive"]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (control.Hello((2, 1), "x"), "message hello: field versions: wanted the lowest"),
        (control.Hello((1, 2), ""), "message hello: field software: wanted 1 to 64"),
        (control.Refuse("mood", "x"), "message refuse: field code: wanted one of"),
        (control.Running(float("nan")), "message running: field first_instruction_at: wanted a finite"),
        (control.Progress(-1, 0, 0), "message progress: field placed_pages: wanted a whole"),
        (control.AllPlaced({"a": 1 << 64}), "message all_placed: field report: wanted a whole number"),
        (control.AllPlaced({"a": (1,)}), "message all_placed: field report: wanted what JSON can say"),
        (control.AllPlaced({"a": [0] * 1025}), "exceeds max_array_len"),
        (control.LayoutOffer((), control.GuestOffer("x", 1)), "message layout_offer: field regions: wanted 1 to 64"),
        (control.State(None, 1.0, "b"), "message state: field guest: wanted"),  # type: ignore[arg-type]
        (control.State(b"", None, "b"), "message state: field stopped_at: "),  # type: ignore[arg-type]
    ],
)
def test_what_this_agent_does_not_say(message: Message, text: str) -> None:
    with pytest.raises(ValueError, match="message") as raised:
        encode(message)
    assert text in str(raised.value)


@given(st.text(max_size=1200))
def test_a_text_for_people_is_made_to_fit(text: str) -> None:
    message = decode(encode(control.Cancel(text)))
    assert isinstance(message, control.Cancel)
    assert message.text.isprintable()
    assert len(message.text) <= 1000
    if text.isprintable() and len(text) <= 1000:
        assert message.text == text


def test_a_cut_text_says_so() -> None:
    message = decode(encode(control.Refuse("internal", "x" * 2000)))
    assert isinstance(message, control.Refuse)
    assert message.text == "x" * 999 + "…"


def test_the_first_refusal_fits_its_limit_whatever_its_text() -> None:
    (message,) = ControlDecoder().feed(encode(control.Refuse("internal", "\U0001f600" * 2000)))
    assert isinstance(message, control.Refuse)


def test_secrets_and_bulk_stay_out_of_logs() -> None:
    assert "token" not in repr(control.Welcome(2, bytes(16), b"secret" * 5 + b"..", "x"))
    assert "abc" not in repr(control.State(b"abc", 1.0, "b"))


def test_layouts_travel() -> None:
    layout = Layout((Region(0, "shmem", 4096, 8192), Region(1, "hugetlb-2M", 2 << 20, 4 << 20)))
    offer = control.LayoutOffer.of(layout, control.GuestOffer("emulated", 2))
    received = decode(encode(offer))
    assert isinstance(received, control.LayoutOffer)
    assert received.layout() == layout


def test_how_much_data_there_is() -> None:
    regions = (control.RegionOffer("shmem", 4096, 1 << 40), control.RegionOffer("shmem", 4096, 8192))
    offer = control.LayoutOffer(regions, control.GuestOffer("emulated", 2), (65536, 1 << 30))
    received = decode(encode(offer))
    assert isinstance(received, control.LayoutOffer)
    assert [received.data_of(0), received.data_of(1)] == [65536, 8192]
    assert control.Probe(regions, offer.guest, offer.data).offer == offer
    unknown = control.LayoutOffer(regions, offer.guest)
    assert [unknown.data_of(0), unknown.data_of(1)] == [1 << 40, 8192], "not said: it may be all"


@pytest.mark.parametrize("data", [(1,), (1, 2, 3)])
def test_data_of_other_regions_makes_no_sense(data: tuple[int, ...]) -> None:
    regions = (control.RegionOffer("shmem", 4096, 8192),) * 2
    received = decode(encode(control.LayoutOffer(regions, control.GuestOffer("x", 1), data)))
    assert isinstance(received, control.LayoutOffer)
    with pytest.raises(ProtocolError, match=f"layout_offer: data of {len(data)} regions out of 2"):
        received.layout()


@pytest.mark.parametrize(
    ("page_size", "size", "text"),
    [
        (12288, 12288, "message layout_offer: region 0: page size 12288 is not a power of two"),
        (4096, 4097, "message layout_offer: region 0: size 4097 is not a multiple of the page size 4096"),
    ],
)
def test_layouts_that_make_no_sense(page_size: int, size: int, text: str) -> None:
    offer = control.LayoutOffer((control.RegionOffer("shmem", page_size, size),), control.GuestOffer("x", 1))
    with pytest.raises(ProtocolError, match=text):
        decode(encode(offer)).layout()  # type: ignore[union-attr]


def test_the_fallback_of_msgpack_in_python_is_as_strict() -> None:
    from msgpack import fallback

    for payload in (b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xc1", b"\x81\xa1t"):
        with pytest.raises((ValueError, msgpack.UnpackException)):
            fallback.unpackb(payload, max_array_len=limits.ARRAY_MAX)
