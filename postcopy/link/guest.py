"""What a migration needs of a guest: whoever wires the rooms together hands one in, this room knows no guest itself.

At the source a guest is handed in. At the destination kinds of guest are, by name: a kind makes ready what can be made
ready before the source's guest stops, and that becomes the guest when its state is there.
"""

from __future__ import annotations

from collections.abc import Mapping as ReadOnly
from collections.abc import Sequence
from typing import Any, Protocol

from postcopy.kernel import Mapping
from postcopy.pump.histogram import Histogram


class MigratingGuest(Protocol):
    """A guest on mapped memory; `postcopy.guest` has some. Any thread may call its methods, one at a time.

    One that has an attribute `takes_poison`, true, gets SIGBUS or a machine check where it touches a page that is lost
    for good, and deals with it; any other is kept waiting there until it ends.
    """

    @property
    def kind(self) -> str:
        """What kind it is of, by name."""

    @property
    def vcpus(self) -> int:
        """Number of vCPUs."""

    @property
    def first_step_at(self) -> float | None:
        """When the first step (or instruction) since the last start was completed, seconds of CLOCK_MONOTONIC."""

    @property
    def last_step_at(self) -> float | None:
        """When the latest step was completed, or left off in its middle, seconds of CLOCK_MONOTONIC."""

    @property
    def stall(self) -> Histogram:
        """How long the guest's own accesses took here."""

    def start(self) -> None:
        """Let the vCPUs go on."""

    def stop(self, deadline: float = 10.0) -> None:
        """Return when every vCPU is parked; PostcopyError where one is not after `deadline` seconds.

        Then it may be called again.
        """

    def save(self) -> dict[str, Any]:
        """Return the device state of the stopped guest, made of what msgpack carries."""

    def close(self) -> None:
        """End the vCPUs; the memory stays."""


class EmptyGuest(Protocol):
    """All that a guest needs on this host but its state."""

    def load(self, state: object) -> MigratingGuest:
        """Make a parked guest of its saved state, without touching the memory; ProtocolError if it is unsound.

        The guest owns from now on what was made ready. Called once, with the source's guest standing still.
        """

    def close(self) -> None:
        """Give back what was made ready, if no guest came of it; the memory stays."""


class GuestKind(Protocol):
    """One kind of guest that this host may have."""

    @property
    def vcpus_max(self) -> int:
        """The most vCPUs that such a guest can have."""

    def check_host(self) -> None:
        """Raise HostError, with the reason, where this host can have no such guest."""

    def empty(self, mappings: Sequence[Mapping], vcpus: int) -> EmptyGuest:
        """Make ready what a guest of so many vCPUs needs beside its memory; HostError where that is not to be had.

        Called in a thread, before the source's guest stops: what takes time or can fail belongs here.
        """


Kinds = ReadOnly[str, GuestKind]
"""The kinds of guest that an agent knows, by name."""
