"""Addresses: what people type, and what they meant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import UsageError
from postcopy.link.address import TcpAddress, UnixAddress, parse_address, parse_host_port


@pytest.mark.parametrize(
    ("text", "address", "loopback"),
    [
        ("tcp:127.0.0.1:7000", TcpAddress("127.0.0.1", 7000), True),
        ("tcp:localhost:0", TcpAddress("localhost", 0), True),
        ("tcp:[::1]:65535", TcpAddress("::1", 65535), True),
        ("tcp:[fe80::1]:7000", TcpAddress("fe80::1", 7000), False),
        ("tcp:0.0.0.0:7000", TcpAddress("0.0.0.0", 7000), False),
        ("tcp:host.example:7000", TcpAddress("host.example", 7000), False),
        ("unix:/run/postcopy.sock", UnixAddress("/run/postcopy.sock"), True),
        ("unix:relative:with:colons", UnixAddress("relative:with:colons"), True),
    ],
)
def test_addresses(text, address, loopback):
    assert parse_address(text) == address
    assert str(address) == text
    assert address.loopback is loopback


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "write it tcp:HOST:PORT or unix:PATH"),
        ("127.0.0.1:7000", "write it tcp:HOST:PORT or unix:PATH"),
        ("udp:host:1", "write it tcp:HOST:PORT or unix:PATH"),
        ("tcp:host", "write it tcp:HOST:PORT"),
        ("tcp:host:", "write it tcp:HOST:PORT"),
        ("tcp::7000", "write it tcp:HOST:PORT"),
        ("tcp:host:http", "write it tcp:HOST:PORT"),
        ("tcp:host:-1", "write it tcp:HOST:PORT"),
        ("tcp:host:٣", "write it tcp:HOST:PORT"),
        ("tcp:host:65536", "port 65536 is beyond 65535"),
        ("tcp:host:99999999999999999999", "is beyond 65535"),
        ("tcp:::1:7000", "write an IPv6 address in brackets"),
        ("tcp:[::1]7000", "write it tcp:HOST:PORT"),
        ("tcp:[::1]", "write it tcp:HOST:PORT"),
        ("tcp:[host]:7000", "brackets hold an IPv6 address"),
        ("unix:", "names no file"),
        ("unix:a\0b", "names no file"),
        ("unix:" + "x" * 108, "at most 107 bytes"),
    ],
)
def test_what_is_no_address(text, problem):
    with pytest.raises(UsageError, match=problem) as caught:
        parse_address(text)
    assert caught.value.exit_status == 2


@given(st.text())
def test_an_address_or_a_usage_error_and_nothing_else(text):
    for parse in (parse_address, parse_host_port):
        try:
            address = parse(text)
        except UsageError:
            continue
        assert parse(str(address)) == address


def test_host_and_port_without_a_scheme():
    assert parse_host_port("127.0.0.1:9100") == parse_host_port("tcp:127.0.0.1:9100") == TcpAddress("127.0.0.1", 9100)
