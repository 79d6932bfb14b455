"""What one field of a control message may hold.

What enters: a value as msgpack gave it, from an agent that may be broken or hostile, or a value of this
agent about to be sent. What leaves: a value of exactly the declared type within its limits; everything else
is an IllTyped with the reason. Each kind of field has two directions: `take` for what arrives, `give` for
what is sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from postcopy.limits import MIGRATION_ID_BYTES, NAME_CHARS_MAX, REPORT_DEPTH_MAX, TEXT_CHARS_MAX, TOKEN_BYTES


class IllTypedError(ValueError):
    """A field holds something else than declared; its text says what was wanted."""


class Kind(Protocol):
    """One kind of field."""

    def take(self, value: object) -> object:
        """Return the value that arrived, checked; IllTypedError."""

    def give(self, value: Any) -> object:
        """Return what to send for a value of this agent, checked; IllTypedError."""


@dataclass(frozen=True)
class Whole:
    """A whole number from `lowest` to `highest`; true and false are none."""

    lowest: int
    highest: int

    def take(self, value: object) -> int:
        """Return it if it is one."""
        if type(value) is not int or not self.lowest <= value <= self.highest:
            raise IllTypedError(f"wanted a whole number from {self.lowest} to {self.highest}")
        return value

    give = take


class Finite:
    """A finite floating-point number, such as a time in seconds."""

    def take(self, value: object) -> float:
        """Return it if it is one."""
        if type(value) is not float or not math.isfinite(value):
            raise IllTypedError("wanted a finite floating-point number")
        return value

    def give(self, value: float) -> float:
        """Return it as a floating-point number."""
        return self.take(float(value))


@dataclass(frozen=True)
class Octets:
    """From `shortest` to `longest` bytes."""

    shortest: int
    longest: int

    def take(self, value: object) -> bytes:
        """Return them if they are."""
        if type(value) is not bytes or not self.shortest <= len(value) <= self.longest:
            exact = self.shortest == self.longest
            raise IllTypedError(f"wanted {'' if exact else f'{self.shortest} to '}{self.longest} bytes")
        return value

    give = take


@dataclass(frozen=True)
class Name:
    """One to `longest` printable characters: what goes into a log line cannot begin another one."""

    longest: int = NAME_CHARS_MAX

    def take(self, value: object) -> str:
        """Return it if it is one."""
        if type(value) is not str or not 0 < len(value) <= self.longest or not value.isprintable():
            raise IllTypedError(f"wanted 1 to {self.longest} printable characters")
        return value

    give = take


class Text:
    """A text for people in one line; made to fit when it is sent, for it may hold an error of anywhere."""

    def take(self, value: object) -> str:
        """Return it if it is one."""
        if type(value) is not str or len(value) > TEXT_CHARS_MAX or not value.isprintable():
            raise IllTypedError(f"wanted at most {TEXT_CHARS_MAX} printable characters")
        return value

    def give(self, value: str) -> str:
        """Return it with line ends and the like made spaces, cut to the limit."""
        line = "".join(character if character.isprintable() else " " for character in value[:TEXT_CHARS_MAX])
        return self.take(line[:-1] + "…" if len(value) > TEXT_CHARS_MAX else line)


@dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    words: tuple[str, ...]

    def take(self, value: object) -> str:
        """Return it if it is one."""
        if type(value) is not str or value not in self.words:
            raise IllTypedError(f"wanted one of {', '.join(self.words)}")
        return value

    give = take


@dataclass(frozen=True)
class Counts:
    """At most `longest` whole numbers from 0 on, as an array."""

    longest: int

    def take(self, value: object) -> tuple[int, ...]:
        """Return them if they are."""
        if type(value) is not list or len(value) > self.longest:
            raise IllTypedError(f"wanted an array of 0 to {self.longest}")
        return tuple(_COUNT.take(number) for number in value)

    def give(self, value: tuple[int, ...]) -> list[int]:
        """Return them as an array."""
        return list(self.take(list(value)))


class VersionRange:
    """The lowest and the highest version that an agent speaks."""

    def take(self, value: object) -> tuple[int, int]:
        """Return them from an array of two."""
        if type(value) is not list or len(value) != 2:
            raise IllTypedError("wanted the lowest and the highest version")
        lowest, highest = (VERSION_NUMBER.take(number) for number in value)
        if lowest > highest:
            raise IllTypedError("wanted the lowest version first")
        return lowest, highest

    def give(self, value: tuple[int, int]) -> list[int]:
        """Return them as an array."""
        return list(self.take(list(value)))


_COUNT = Whole(0, (1 << 64) - 1)
_INTEGER = Whole(-(1 << 63), (1 << 64) - 1)
_FINITE = Finite()


class Report:
    """A map of anything that JSON can say, for reports: their fields are no matter of the wire."""

    def take(self, value: object) -> dict[str, Any]:
        """Return it if it is one."""
        if type(value) is not dict:
            raise IllTypedError("wanted a map")
        self._check(value, REPORT_DEPTH_MAX)
        return value

    give = take

    def _check(self, value: object, depth: int) -> None:
        if depth == 0 and type(value) in {dict, list}:
            raise IllTypedError(f"wanted at most {REPORT_DEPTH_MAX} maps and arrays inside each other")
        if type(value) is dict:
            if not all(type(key) is str for key in value):
                raise IllTypedError("wanted texts as keys")
            for part in value.values():
                self._check(part, depth - 1)
        elif type(value) is list:
            for part in value:
                self._check(part, depth - 1)
        elif type(value) is float:
            _FINITE.take(value)
        elif type(value) is int:
            _INTEGER.take(value)
        elif value is not None and type(value) not in {bool, str}:
            raise IllTypedError("wanted what JSON can say")


VERSION_NUMBER = Whole(1, (1 << 16) - 1)

# The types as messages declare them.
Count = Annotated[int, _COUNT]
Version = Annotated[int, VERSION_NUMBER]
Versions = Annotated[tuple[int, int], VersionRange()]
Instant = Annotated[float, _FINITE]
NameText = Annotated[str, Name()]
LineText = Annotated[str, Text()]
MigrationId = Annotated[bytes, Octets(MIGRATION_ID_BYTES, MIGRATION_ID_BYTES)]
Token = Annotated[bytes, Octets(TOKEN_BYTES, TOKEN_BYTES)]
ReportMap = Annotated[dict[str, Any], Report()]
