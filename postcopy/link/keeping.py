"""What outlives a source's agent that is killed: the files of the guest's memory, and how to go on with its migration.

At the source's interpreter what there is to know enters before Run is sent, as a Record; its bytes leave for whoever
keeps them, in a process of his own. In an agent that takes the place of a killed one they come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import msgpack

from postcopy.errors import HostError, ProtocolError, UsageError
from postcopy.kernel import Mapping
from postcopy.limits import MIGRATION_ID_BYTES, REGIONS_MAX, TOKEN_BYTES
from postcopy.link.guest import MigratingGuest
from postcopy.pump.histogram import Histogram
from postcopy.wire.unpack import unpack


class Keeping(Protocol):
    """Whoever keeps memory and record."""

    def keep(self, record: bytes) -> None:
        """Have the record safe when this returns, as far as this process is concerned."""

    def forget(self) -> None:
        """Drop the record: the guest runs here, and ends with this agent."""

    def release(self) -> None:
        """Drop all of it: nobody needs it any more."""


@dataclass(frozen=True)
class Record:
    """Enough to go on with a migration whose Run was sent. The token is a secret: it goes to no log and no disk.

    `elsewhere`: where somebody says that the destination is now, while it has not answered there. `held`: somebody
    has paused it, and it is not to go on before somebody says so.
    """

    version: int
    migration_id: bytes
    token: bytes = field(repr=False)
    address: str
    elsewhere: str
    regions: tuple[tuple[str, int, int], ...]  # type, page size and size of each
    guest: tuple[str, int]  # kind and number of vCPUs
    tls: bool
    state: bytes = field(repr=False)
    push: bool
    held: bool
    rate: int | None
    started: float
    stopped: float
    stopped_at: float
    run_sent: float

    def pack(self) -> bytes:
        """Return it as bytes."""
        packed: bytes = msgpack.packb(asdict(self))
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Record:
        """Return what pack() gave; UsageError where it did not."""
        try:
            values = unpack(data, "the record")
            if not isinstance(values, dict) or (values := _LATER | values).keys() != _SHAPES.keys():
                raise UsageError("what was kept cannot be read: it is no record of a migration")
            wrong = [name for name, fits in _SHAPES.items() if not fits(values[name])]
            if wrong:
                raise UsageError(f"what was kept cannot be read: {', '.join(wrong)}")
        except ProtocolError as error:
            raise UsageError(f"what was kept cannot be read: {error}") from None
        values["regions"] = tuple(tuple(region) for region in values["regions"])
        values["guest"] = tuple(values["guest"])
        return cls(**values)


def _is(*wanted: type) -> Callable[[object], bool]:
    return lambda value: type(value) in wanted


def _list_of(*wanted: type) -> Callable[[object], bool]:
    return lambda value: type(value) is list and tuple(map(type, value)) == wanted


def _regions(value: object) -> bool:
    is_region = _list_of(str, int, int)
    return isinstance(value, list) and 0 < len(value) <= REGIONS_MAX and all(map(is_region, value))


def _time(value: object) -> bool:
    return type(value) in {float, int} and math.isfinite(value)  # type: ignore[arg-type]


_SHAPES: dict[str, Callable[[object], bool]] = {
    "version": _is(int),
    "migration_id": lambda value: type(value) is bytes and len(value) == MIGRATION_ID_BYTES,
    "token": lambda value: type(value) is bytes and len(value) == TOKEN_BYTES,
    "address": _is(str),
    "elsewhere": _is(str),
    "regions": _regions,
    "guest": _list_of(str, int),
    "tls": _is(bool),
    "state": _is(bytes),
    "push": _is(bool),
    "held": _is(bool),
    "rate": _is(int, type(None)),
    "started": _time,
    "stopped": _time,
    "stopped_at": _time,
    "run_sent": _time,
}
"""What each field of a Record has to be: it may come from an agent of another version, or from anybody."""

_LATER: dict[str, object] = {"elsewhere": "", "held": False}
"""Fields that agents before this one did not keep, and what that meant."""


Restore = Callable[[Sequence[Mapping], object], MigratingGuest]
"""Make a parked guest of its memory and its state."""


class KeptGuest:
    """A guest whose memory and state are here and which runs somewhere else, or is to run here again.

    `restore` makes it of its memory and state.
    """

    def __init__(self, record: Record, mappings: Sequence[Mapping], restore: Restore) -> None:
        self.kind, self.vcpus = record.guest
        self.guest: MigratingGuest | None = None
        self._record = record
        self._mappings = mappings
        self._restore = restore

    @property
    def first_step_at(self) -> float | None:
        """When it made its first step here."""
        return None if self.guest is None else self.guest.first_step_at

    @property
    def last_step_at(self) -> float | None:
        """When it made its latest step here."""
        return None if self.guest is None else self.guest.last_step_at

    @property
    def stall(self) -> Histogram:
        """How long its accesses took here."""
        return Histogram() if self.guest is None else self.guest.stall

    def make(self) -> None:
        """Make it here, parked, as its record says. HostError where that cannot be: all that it is made of stays."""
        if self.guest is not None:
            return
        try:
            self.guest = self._restore(self._mappings, msgpack.unpackb(self._record.state))
        except Exception as error:  # whatever it was, the record must outlive it
            raise HostError(f"the guest never ran anywhere else, and cannot be made here: {error}") from error

    def start(self) -> None:
        """Let it run here: only where it never ran anywhere else."""
        self.make()
        assert self.guest is not None  # noqa: S101 - it is made
        self.guest.start()

    def stop(self, deadline: float = 10.0) -> None:
        """Stop it, if it runs here."""
        if self.guest is not None:
            self.guest.stop(deadline)

    def save(self) -> dict[str, Any]:
        """Return its state."""
        return {} if self.guest is None else self.guest.save()

    def close(self) -> None:
        """End it, if it runs here."""
        if self.guest is not None:
            self.guest.close()
