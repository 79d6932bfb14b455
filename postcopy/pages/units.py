"""Sizes, rates and times as people type and read them.

What enters: text from a command line, or numbers in bytes, bytes a second and seconds. What leaves: the other
one. K, M, G and T are powers of 1024, with or without `iB`; `MB` is refused, since half its readers take it
for 10**6.
"""

from __future__ import annotations

import re

from postcopy.errors import UsageError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s?(?:([KMGT])(?:iB)?|B)?", re.IGNORECASE | re.ASCII)
_UNITS_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_UNITS_TIME = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def parse_size(text: str) -> int:
    """Return the bytes that `text` means ("256MiB", "1.5G", "4096"); UsageError where it means none."""
    return _parse(text, "size", 'like "256MiB", "1G" or "4096"')


def parse_rate(text: str) -> int:
    """Return the bytes a second that `text` means, such as "100MiB/s"; the "/s" may be left out."""
    return _parse(text, "rate", 'like "100MiB/s"', suffix="/s")


def _parse(text: str, what: str, example: str, suffix: str = "") -> int:
    found = _SIZE.fullmatch(text.strip().removesuffix(suffix) if suffix else text.strip())
    if found is None:
        raise UsageError(f"{what} {text!r} is not understood: write it {example}")
    power = _POWERS[(found[2] or "").upper()]
    whole, _, part = found[1].partition(".")
    scale: int = 10 ** len(part)
    number, rest = divmod(int(whole + part) << 10 * power, scale)
    if rest:
        raise UsageError(f"{what} {text!r} is not a whole number of bytes")
    return number


def format_size(size: float) -> str:
    """Return bytes as "256 MiB", "1.5 GiB" or "17 B": at most four digits."""
    power = 0
    # 1023.5 KiB would be rounded to 1024 KiB: that is 1 MiB.
    while abs(size) >= 1023.5 and power < len(_UNITS_BINARY) - 1:
        size /= 1024
        power += 1
    return f"{_short(size)} {_UNITS_BINARY[power]}"


def format_rate(rate: float) -> str:
    """Return bytes a second as "100 MiB/s"."""
    return f"{format_size(rate)}/s"


def format_seconds(seconds: float) -> str:
    """Return a time as "12.3 µs", "1.5 ms" or "2 s"; what is below a microsecond is in nanoseconds."""
    for scale, unit in _UNITS_TIME:
        # 0.9996 ms would be rounded to 1000 µs: that is 1 ms.
        if abs(seconds) >= 0.9995 * scale:
            return f"{_short(seconds / scale)} {unit}"
    return f"{seconds / 1e-9:.0f} ns" if seconds else "0 s"


def _short(number: float) -> str:
    """Return three significant digits, all of a longer whole part, and no zeros at the end of a fraction."""
    if abs(number) >= 100:
        return f"{number:.0f}"
    digits = 2 if abs(number) < 10 else 1
    return f"{number:.{digits}f}".rstrip("0").rstrip(".")
