"""What options may hold: the types of click that turn typed text into values, each with its error in one line.

And the options that the commands of several files have alike.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from postcopy.errors import PostcopyError, UsageError
from postcopy.limits import CPU_MAX, GUEST_VCPUS_MAX, RATE_MAX, STEPS_MAX, STEPS_PER_SECOND_MAX
from postcopy.link.address import parse_address, parse_host_port
from postcopy.pages.units import format_size, parse_rate, parse_size

DESCRIPTOR = "fd"
# What is judged by itself must not fail for want of memory.
PAGES_OF_SOME_GUEST = 1 << 20
# Types of memory of which one says where: of a guest's, and of a snapshot's.
PLACED = ("tmpfs", "hugetlbfs")
SNAPSHOT = "file"


def typed(context: click.Context, option: click.Parameter) -> bool:
    """Whether an option's value was typed: whoever did that knows which one an error is about."""
    source = context.get_parameter_source(option.name or "")
    return source not in {ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP}


@contextlib.contextmanager
def of_option(context: click.Context | None, option: click.Parameter | None) -> Iterator[None]:
    """Have what is wrong with a value that nobody typed say where it came from."""
    try:
        yield
    except PostcopyError as error:
        if context is None or option is None or typed(context, option):
            raise
        raise click.BadParameter(str(error), context, option) from error


class Parsed(click.ParamType[Any]):
    """A type made of a function from text to value; what it raises goes to whoever typed it."""

    def __init__(self, name: str, parse: Any) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the value that the text means."""
        with of_option(context, param):
            return self._parse(value) if isinstance(value, str) else value


class Judged(click.ParamType[Any]):
    """Another type's values, but for those that `judge` raises at, as what they are for would do later."""

    def __init__(self, other: click.ParamType[Any], judge: Callable[[Any], object]) -> None:
        self.name = other.name
        self._other = other
        self._judge = judge

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the value of the other type."""
        converted = self._other.convert(value, param, context)
        with of_option(context, param):
            self._judge(converted)
        return converted


class Part(click.FloatRange):
    """Part of a whole: from 0 to below 1."""

    def __init__(self) -> None:
        super().__init__(0, 1, max_open=True)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the number, if it is one."""
        part = super().convert(value, param, context)
        if math.isnan(part):
            self.fail(f"{value!r} is no number", param, context)
        return part


def of_guest(field: str) -> Callable[[Any], object]:
    """Make the judge of one field of a guest: whether any guest could have this value."""

    def judge(value: Any) -> None:
        from postcopy.guest.state import wanted_state  # noqa: PLC0415 - not for --help, here and below

        wanted_state(PAGES_OF_SOME_GUEST, **{field: value})

    return judge


def judge_kind(name: str) -> None:
    """Refuse the name of a kind of guest that there is not."""
    from postcopy.guest.kinds import kind_named  # noqa: PLC0415

    kind_named(name)


def judge_mode(name: str) -> None:
    """Refuse the name of a mode that there is not."""
    from postcopy.link.placement import known_mode  # noqa: PLC0415

    known_mode(name)


def judge_removal(name: str) -> None:
    """Refuse what no removal means."""
    from postcopy.link.placement import known_removal  # noqa: PLC0415

    known_removal(name)


def judge_admin(text: str) -> None:
    """Refuse what is no address of a Unix socket."""
    from agent.admin import admin_address  # noqa: PLC0415

    admin_address(text)


def judge_memory(memory: Memory) -> None:
    """Refuse a type that there is not, or that cannot have such a place; what lies there is seen when it is used."""
    if memory.type == SNAPSHOT or (memory.place is not None and memory.type.partition("-")[0] in PLACED):
        return
    from postcopy.kernel.types import memory_type_at  # noqa: PLC0415

    memory_type_at(memory.type, memory.place)


def parse_cpus(text: str) -> tuple[int, ...]:
    """Return CPU numbers from "0,2-3"."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            if int(last if dash else first) > CPU_MAX:
                raise click.BadParameter(f"CPUs {text!r}: no host has more than {CPU_MAX + 1}")
            these = range(int(first), int(last if dash else first) + 1)
            if not these:
                raise click.BadParameter(f"CPUs {text!r}: there are none from {first} to {last}")
            numbers += these
    except ValueError:
        raise click.BadParameter(f"CPUs {text!r} are not understood: write them like 0,2-3") from None
    return tuple(numbers)


def parse_seconds(text: str) -> float:
    """Return a time that is over one day: no less than nothing, and neither "nan" nor "inf"."""
    try:
        seconds = float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no number of seconds") from None
    if not math.isfinite(seconds) or seconds < 0:
        raise click.BadParameter(f"{text!r} is not a time that passes: write seconds, like 2.5")
    return seconds


def parse_limit(text: str) -> float:
    """Return a time limit: seconds, more than none."""
    seconds = parse_seconds(text)
    if not seconds:
        raise click.BadParameter("within no time nothing is done: write seconds, like 2.5")
    return seconds


def parse_bandwidth(text: str) -> int:
    """Return bytes a second, 0 for no limit."""
    rate = parse_rate(text)
    if rate > RATE_MAX:
        raise click.BadParameter(f"{text!r} is more than any network carries: write 0 for no limit")
    return rate


def descriptor(option: str, *refused: int) -> Parsed:
    """Make the type of a descriptor that was handed over, open and in none of the `refused` modes (O_RDONLY ...).

    It is looked at before this process opens any of its own, which could come to have that very number.
    """

    def parse(text: str) -> int:
        try:
            number = int(text)
            os.fstat(number)
        except ValueError:
            raise UsageError(f"{option} {text!r}: this is no number") from None
        except (OSError, OverflowError):
            raise UsageError(f"{option} {text}: Bad file descriptor") from None
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE in refused:
            raise UsageError(f"{option} {text}: it was opened for something else")
        return number

    return Parsed(DESCRIPTOR, parse)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a guest has as one region: a memory type, where its file lies, and its size in bytes, if these are said."""

    type: str
    place: Path | None = None
    size: int | None = None

    def __str__(self) -> str:
        parts = [self.type, *([str(self.place)] if self.place else []), *([str(self.size)] if self.size else [])]
        return ":".join(parts)

    def describe(self) -> str:
        """Return it in words, for people."""
        size = f"{format_size(self.size)} of " if self.size else ""
        return f"{size}{self.type}" + (f" in {self.place}" if self.place else "")


def parse_space(text: str) -> int:
    """Return the size of a memory: more than none, which would otherwise be taken for "not said"."""
    size = parse_size(text)
    if not size:
        raise UsageError(f"size {text!r}: there is no memory of no size: write it like 256MiB")
    return size


def parse_memory(text: str) -> Memory:
    """Return what "TYPE", "TYPE:SIZE", "TYPE:PATH" or "TYPE:PATH:SIZE" says; a PATH begins with a slash."""
    kind, colon, rest = text.partition(":")
    if rest.startswith("/"):
        place, _, tail = rest.rpartition(":")
        # A size begins with a digit, and what follows a colon in a path would begin with a slash or be part of a name.
        return (
            Memory(kind, Path(place), parse_space(tail)) if place and tail[:1].isdigit() else Memory(kind, Path(rest))
        )
    if not kind or (colon and not rest):
        raise UsageError(f"memory {text!r} is not understood: write TYPE, TYPE:SIZE, TYPE:/PATH or TYPE:/PATH:SIZE")
    return Memory(kind, None, parse_space(rest) if colon else None)


SIZE = Parsed("size", parse_space)
RATE = Parsed("rate", parse_bandwidth)
SECONDS = Parsed("seconds", parse_seconds)
LIMIT = Parsed("seconds", parse_limit)
WRITE_FD = descriptor("--ready-fd", os.O_RDONLY)
READ_FD = descriptor("--end-with-fd", os.O_WRONLY)
ADDRESS = Parsed("address", parse_address)
HOST_PORT = Parsed("host:port", parse_host_port)
CPUS = Parsed("cpus", parse_cpus)
MEMORY = Judged(Parsed("memory", parse_memory), judge_memory)
ADMIN = Judged(click.STRING, judge_admin)
GUEST_KIND = Judged(click.STRING, judge_kind)
MODE = Judged(click.STRING, judge_mode)
REMOVAL = Judged(click.STRING, judge_removal)
WORKLOAD = Judged(click.STRING, of_guest("workload"))
VCPUS = click.IntRange(1, GUEST_VCPUS_MAX)
SEED = click.IntRange(0, (1 << 64) - 1)
STEPS = click.IntRange(0, STEPS_MAX)
STEPS_PER_SECOND = click.IntRange(0, STEPS_PER_SECOND_MAX)
BLANK = Part()

RATE_HELP = "Limit the push, like 100MiB/s; 0: no limit."
json_option = click.option("--json", "as_json", is_flag=True, help="Print one object of JSON on stdout.")
admin_option = click.option("--admin", type=ADMIN, required=True, metavar="unix:PATH", help="The agent's admin socket.")
keeper_option = click.option(
    "--keeper",
    type=ADMIN,
    metavar="unix:PATH",
    help="Have the memory of a guest that leaves in a process of its own, too, which outlives this one.",
)
