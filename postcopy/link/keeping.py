"""What outlives a source's agent that is killed: the files of the guest's memory, and how to go on with its migration.

At the source's interpreter what there is to know enters before Run is sent, as a Record; its bytes leave for whoever
keeps them, in a process of his own. In an agent that takes the place of a killed one they come back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import msgpack

from postcopy.errors import UsageError
from postcopy.kernel import Mapping
from postcopy.link.guest import MigratingGuest
from postcopy.pump.histogram import Histogram


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
    """Enough to go on with a migration whose Run was sent. The token is a secret: it goes to no log and no disk."""

    version: int
    migration_id: bytes
    token: bytes = field(repr=False)
    address: str
    regions: tuple[tuple[str, int, int], ...]  # type, page size and size of each
    guest: tuple[str, int]  # kind and number of vCPUs
    tls: bool
    state: bytes = field(repr=False)
    push: bool
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
            values = msgpack.unpackb(data)
            values["regions"] = tuple((str(kind), int(page), int(size)) for kind, page, size in values["regions"])
            kind, vcpus = values["guest"]
            values["guest"] = (str(kind), int(vcpus))
            record = cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
            raise UsageError(f"what was kept cannot be read: {error!r}") from error
        wrong = [name for name, kinds in _KINDS.items() if not isinstance(getattr(record, name), kinds)]
        if wrong:
            raise UsageError(f"what was kept cannot be read: {', '.join(wrong)}")
        return record


_NUMBER = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("migration_id", "token", "state"), (bytes,)),
    **dict.fromkeys(("started", "stopped", "stopped_at", "run_sent"), _NUMBER),
    **dict.fromkeys(("tls", "push"), (bool,)),
    "version": (int,),
    "address": (str,),
    "rate": (int, type(None)),
}


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

    def start(self) -> None:
        """Let it run here: only where it never ran anywhere else."""
        if self.guest is None:
            self.guest = self._restore(self._mappings, msgpack.unpackb(self._record.state))
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
