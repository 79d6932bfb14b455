"""Preambles: what gets in, and what the log says of what does not."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import ProtocolError
from postcopy.wire import preamble
from postcopy.wire.preamble import PREAMBLE_BYTES, Preamble, Role, Security, psk_identity
from postcopy.wire.version import VERSION, VERSION_MIN, check_version, common

ID, TOKEN = bytes(range(1, 17)), bytes(range(0xA0, 0xC0))
DATA = preamble.pack(Preamble(Role.PUSH, VERSION, ID, TOKEN))


def patched(at: int, *values: int) -> bytes:
    return DATA[:at] + bytes(values) + DATA[at + len(values) :]


@pytest.mark.parametrize("version", range(VERSION_MIN, VERSION + 1))
@pytest.mark.parametrize("role", [Role.URGENT, Role.PUSH])
def test_a_data_connection(role: Role, version: int) -> None:
    said = Preamble(role, version, ID, TOKEN)
    data = preamble.pack(said)
    assert len(data) == PREAMBLE_BYTES == 64
    assert preamble.unpack(data) == said


def test_with_tls_no_token_travels() -> None:
    for said in (Preamble(Role.CONTROL, 3, security=Security.TLS), Preamble(Role.PUSH, 3, ID, security=Security.TLS)):
        assert preamble.unpack(preamble.pack(said)) == said


def test_the_name_of_a_key_says_what_it_is_for() -> None:
    names = {psk_identity(role, id_) for role in (Role.URGENT, Role.PUSH) for id_ in (ID, ID[::-1])}
    assert len(names) == 4
    assert psk_identity(Role.PUSH, ID) == "postcopy push 0102030405060708090a0b0c0d0e0f10"


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_a_control_connection_of_any_version_that_has_something_in_common(version: int) -> None:
    said = Preamble(Role.CONTROL, version)
    assert preamble.unpack(preamble.pack(said)) == said


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (patched(8, 9, 0), r"version 9 is not supported: this agent speaks 2 to 3"),
        (patched(8, 0, 0), r"version 0 is not supported"),
        (patched(10, 0, 0), r"unknown role 0"),
        (patched(10, 6, 0), r"unknown role 6"),
        (patched(12, 2), r"reserved bits"),
        (patched(13, 1), r"reserved bits"),
        (patched(15, 1), r"reserved bits"),
        (patched(12, 1), r"with TLS a token does not travel in the clear"),
        (patched(8, 2, 0, 3, 0, 1), r"version 2 has no TLS"),
        (preamble.pack(Preamble(Role.CONTROL, 2, security=Security.TLS)), r"version 2 has no TLS"),
        (preamble.pack(Preamble(Role.PUSH, 3, security=Security.TLS)), r"needs a migration id"),
        (patched(10, 1, 0), r"a control connection has no migration id and no token"),
        (preamble.pack(Preamble(Role.CONTROL, 0)), r"version 0 is not supported"),
        (preamble.pack(Preamble(Role.CONTROL, VERSION + 1)), r"version 4 is not supported"),
        (preamble.pack(Preamble(Role.CONTROL, 2, ID)), r"a control connection has no migration id and no token"),
        (preamble.pack(Preamble(Role.CONTROL, 2, token=TOKEN)), r"a control connection has no migration id and no"),
        (patched(16, *bytes(16)), r"a data connection needs a migration id and a token"),
        (patched(32, *bytes(32)), r"a data connection needs a migration id and a token"),
        (DATA[:63], r"ended inside its preamble, after 63 of 64 bytes"),
        (DATA + b"x", r"after 65 of 64 bytes"),
        (b"", r"after 0 of 64 bytes"),
        (b"GET / HTTP/1.1\r\n", r"not a postcopy connection: it begins with 'GET / HT'"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", r"it begins with '\\x16\\x03\\x01\\x02\\x00\\x01\\x00\\x01'"),
        (bytes(64), r"not a postcopy connection"),
        (b"POSTCOPx" + DATA[8:], r"it begins with 'POSTCOPx'"),
    ],
)
def test_what_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text) as raised:
        preamble.unpack(data)
    assert str(raised.value).isprintable(), "one line of a log"


@given(st.binary(max_size=80))
def test_any_bytes_end_in_a_preamble_or_a_protocol_error(data: bytes) -> None:
    for candidate in (data, DATA[: 64 - len(data)] + data, DATA[:8] + data + bytes(64)[len(data) + 8 :]):
        with contextlib.suppress(ProtocolError):
            assert preamble.pack(preamble.unpack(candidate)) == candidate


@given(st.integers(0, 64))
def test_a_stranger_is_known_by_the_first_byte_that_differs(size: int) -> None:
    preamble.check_start(DATA[:size])
    wrong = DATA[: min(size, 7)] + b"\xff"
    with pytest.raises(ProtocolError, match="not a postcopy connection"):
        preamble.check_start(wrong)


def test_a_token_stays_out_of_logs() -> None:
    assert TOKEN.hex() not in repr(preamble.unpack(DATA))
    assert str(TOKEN)[2:10] not in repr(preamble.unpack(DATA))


@pytest.mark.parametrize(("migration_id", "token"), [(ID[1:], TOKEN), (ID, TOKEN + b"x")])
def test_lengths_are_fixed(migration_id: bytes, token: bytes) -> None:
    with pytest.raises(ValueError, match="a migration id has 16 bytes, a token 32"):
        preamble.pack(Preamble(Role.PUSH, VERSION, migration_id, token))


def test_an_agent_that_has_unlearned_a_version_still_hears_what_an_older_source_has_to_offer() -> None:
    assert preamble.unpack(preamble.pack(Preamble(Role.CONTROL, 1))).version == 1
    assert common((1, 1), (VERSION_MIN, VERSION)) == 0
    with pytest.raises(ProtocolError, match="version 1 is not supported: this agent speaks 2 to 3"):
        preamble.unpack(preamble.pack(Preamble(Role.PUSH, 1, ID, TOKEN)))


@given(st.integers(0, 5), st.integers(0, 5))
def test_negotiation_takes_the_highest_in_common(lowest: int, more: int) -> None:
    offered = (lowest, lowest + more)
    both = set(range(lowest, lowest + more + 1)) & set(range(VERSION_MIN, VERSION + 1))
    assert common(offered, (VERSION_MIN, VERSION)) == max(both, default=0)


def test_the_current_version_and_the_one_before() -> None:
    assert VERSION - VERSION_MIN == 1
    assert [check_version(version) for version in (2, 3)] == [2, 3]
    for version in (1, 4):
        with pytest.raises(ProtocolError, match=f"version {version} is not supported: this agent speaks 2 to 3"):
            check_version(version)
