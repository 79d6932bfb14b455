"""Records: a dataclass as a map of msgpack, by the table that its declared fields are.

What enters: a map as it arrived, or an instance to be sent. What leaves: the other one. A map has exactly the
declared fields, no more and no fewer, each of its declared kind. A field that is younger than the first version is
declared `Since` its version, and has a default: in a version before it, it is neither sent nor taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_type_hints

from postcopy.wire.fields import IllTypedError, Kind
from postcopy.wire.version import VERSION

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Shape = TypeVar("Shape", bound="DataclassInstance")


def quote(name: object) -> str:
    """Quote a name that another agent chose, short and in one line."""
    return repr(name) if len(repr(name)) <= 40 else repr(name)[:39] + "…"


@dataclass(frozen=True)
class Since:
    """The version from which on a field is there."""

    version: int


class Record(Generic[Shape]):
    """The kind of field, or the message, that holds one instance of `shape`, as it is in `version`."""

    def __init__(self, shape: type[Shape], version: int = VERSION) -> None:
        self.shape = shape
        hints = get_type_hints(shape, include_extras=True)
        declared = {field.name: hints[field.name].__metadata__ for field in fields(shape)}
        self.kinds: dict[str, Kind] = {
            name: kind for name, (kind, *since) in declared.items() if all(version >= one.version for one in since)
        }

    def take(self, value: object) -> Shape:
        """Return the instance that a map says; IllTypedError names the field."""
        if type(value) is not dict:
            raise IllTypedError("wanted a map")
        return self.take_fields(value)

    def take_fields(self, values: Mapping[object, object]) -> Shape:
        """Return the instance that these fields say; IllTypedError names the field."""
        for name in values:
            if name not in self.kinds:
                raise IllTypedError(f"unknown field {quote(name)}")
        taken = {}
        for name, kind in self.kinds.items():
            if name not in values:
                raise IllTypedError(f"field {name} is missing")
            try:
                taken[name] = kind.take(values[name])
            except IllTypedError as error:
                raise IllTypedError(f"field {name}: {error}") from None
        return self.shape(**taken)

    def give(self, value: Shape) -> dict[str, Any]:
        """Return the map that says an instance; IllTypedError names the field that cannot be."""
        given = {}
        for name, kind in self.kinds.items():
            try:
                given[name] = kind.give(getattr(value, name))
            except (IllTypedError, TypeError) as error:
                raise IllTypedError(f"field {name}: {error}") from None
        return given


@dataclass(frozen=True)
class Records(Generic[Shape]):
    """From `shortest` to `longest` instances of a record, as an array."""

    record: Record[Shape]
    longest: int
    shortest: int = 1

    def take(self, value: object) -> tuple[Shape, ...]:
        """Return the instances that an array of maps says."""
        if type(value) is not list or not self.shortest <= len(value) <= self.longest:
            raise IllTypedError(f"wanted an array of {self.shortest} to {self.longest}")
        return tuple(self._numbered(number, part) for number, part in enumerate(value))

    def _numbered(self, number: int, part: object) -> Shape:
        try:
            return self.record.take(part)
        except IllTypedError as error:
            raise IllTypedError(f"entry {number}: {error}") from None

    def give(self, value: tuple[Shape, ...]) -> list[dict[str, Any]]:
        """Return the array of maps that says the instances."""
        if not self.shortest <= len(value) <= self.longest:
            raise IllTypedError(f"wanted {self.shortest} to {self.longest}")
        return [self.record.give(part) for part in value]
