"""Sizes, rates and times: what people may type, what they read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import UsageError
from postcopy.pages import format_rate, format_seconds, format_size, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("0", 0),
        ("17B", 17),
        ("256MiB", 256 << 20),
        ("256 MiB", 256 << 20),
        ("256mib", 256 << 20),
        ("1G", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("2K", 2048),
        ("3TiB", 3 << 40),
        (" 1M ", 1 << 20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "M", "-1", "1MB", "1Mi", "1e6", "0x10", "1 2", "1.G", ".5G", "1GiB/s", "1PiB", "٣", "1_000", "nan", "9" * 21],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match='is not understood: write it like "256MiB"'):
        parse_size(text)


def test_a_part_of_a_byte() -> None:
    with pytest.raises(UsageError, match=r"size '1\.0001K' is not a whole number of bytes"):
        parse_size("1.0001K")


@pytest.mark.parametrize(("text", "rate"), [("100MiB/s", 100 << 20), ("1G", 1 << 30), ("0", 0)])
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["fast", "1/s/s", "1 MiB / s", "100Mbit/s"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(UsageError, match=r'rate .* is not understood: write it like "100MiB/s"'):
        parse_rate(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (256 << 20, "256 MiB"),
        ((1 << 20) - 1, "1 MiB"),
        (1 << 50, "1024 TiB"),
        (1234567, "1.18 MiB"),
    ],
)
def test_sizes_to_read(size: int, text: str) -> None:
    assert format_size(size) == text
    assert format_rate(size) == f"{text}/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (1e-9, "1 ns"),
        (12.34e-6, "12.3 µs"),
        (0.00099996, "1 ms"),
        (0.0015, "1.5 ms"),
        (0.25, "250 ms"),
        (0.9999, "1 s"),
        (2.0, "2 s"),
        (123.4, "123 s"),
        (-0.0015, "-1.5 ms"),
    ],
)
def test_times_to_read(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.integers(0, 1 << 60))
def test_what_is_written_is_read_back_nearly(size: int) -> None:
    number, unit = format_size(size).split()
    power = ("B", "KiB", "MiB", "GiB", "TiB").index(unit)
    assert float(number) * 1024**power == pytest.approx(size, rel=0.006)


@given(st.floats(1e-9, 1e6))
def test_times_are_written_within_a_rounding(seconds: float) -> None:
    number, unit = format_seconds(seconds).split()
    scale = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}[unit]
    assert float(number) * scale == pytest.approx(seconds, rel=0.0051, abs=0.51e-9)
    assert float(number) < 1000 or unit == "s"
