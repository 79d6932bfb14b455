"""What options may hold: the types of click that turn typed text into values, each with its error in one line."""

from __future__ import annotations

from typing import Any

import click

from postcopy.link.address import parse_address, parse_host_port
from postcopy.pages.units import parse_rate, parse_size


class Parsed(click.ParamType[Any]):
    """A type made of a function from text to value; what it raises goes to whoever typed it."""

    def __init__(self, name: str, parse: Any) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, _param: click.Parameter | None, _context: click.Context | None) -> Any:
        """Return the value that the text means."""
        return self._parse(value) if isinstance(value, str) else value


def parse_cpus(text: str) -> tuple[int, ...]:
    """Return CPU numbers from "0,2-3"."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            numbers += range(int(first), int(last if dash else first) + 1)
    except ValueError:
        raise click.BadParameter(f"CPUs {text!r} are not understood: write them like 0,2-3") from None
    return tuple(numbers)


SIZE = Parsed("size", parse_size)
RATE = Parsed("rate", parse_rate)
ADDRESS = Parsed("address", parse_address)
HOST_PORT = Parsed("host:port", parse_host_port)
CPUS = Parsed("cpus", parse_cpus)
