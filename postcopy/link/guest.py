"""What a migration needs of a guest: whoever wires the rooms together hands one in, this room knows no guest itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from postcopy.kernel import Mapping
from postcopy.pump.histogram import Histogram


class MigratingGuest(Protocol):
    """A guest on mapped memory; `postcopy.guest.Guest` is one. Any thread may call its methods, one at a time."""

    kind: str

    @property
    def vcpus(self) -> int:
        """Number of vCPUs."""

    @property
    def first_step_at(self) -> float | None:
        """When the first step since the last start was completed, seconds of CLOCK_MONOTONIC."""

    @property
    def last_step_at(self) -> float | None:
        """When the latest step was completed, seconds of CLOCK_MONOTONIC."""

    @property
    def stall(self) -> Histogram:
        """How long the guest's own accesses took here."""

    def start(self) -> None:
        """Let the vCPUs go on."""

    def stop(self, deadline: float = 10.0) -> None:
        """Return when every vCPU is parked between two steps; PostcopyError where one is not after `deadline` seconds.

        Then it may be called again.
        """

    def save(self) -> dict[str, Any]:
        """Return the device state of the stopped guest, made of what msgpack carries."""

    def close(self) -> None:
        """End the vCPUs; the memory stays."""


Restore = Callable[[Sequence[Mapping], object], MigratingGuest]
"""Make a parked guest of its memory and its saved state, without touching the memory; ProtocolError if unsound."""
