"""What a migration needs of a guest: whoever wires the rooms together hands one in, this room knows no guest itself.

At the source a guest is handed in. At the destination kinds of guest are, by name: a kind makes ready what can be made
ready before the source's guest stops, and that becomes the guest when its state is there. `GuestBase` and
`KindFromState` are what a guest of one's own is written in few lines with.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from collections.abc import Mapping as ReadOnly
from typing import Any, ClassVar, Protocol

from postcopy.kernel import Mapping
from postcopy.pump.histogram import Histogram


class MigratingGuest(Protocol):
    """A guest on mapped memory; `postcopy.guest` has some. Any thread may call its methods, one at a time.

    One that has a method `lose(extents)` is told with it which of its memory is lost for good, as (region, offset,
    length) in bytes, and gets SIGBUS or a machine check where it touches that from then on; any other is kept waiting
    there until it ends. If one has `stall_per_vcpu`, a list of Histograms, its source hears them for `top`: it is read
    twice a second in the event loop's thread, whatever other threads do, and has to return at once.
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


class GuestBase(ABC):
    """A guest of one's own: `kind` names it, start(), stop() and save() are to be written, the rest may stay.

    Whatever runs on the memory calls stepped() as soon as it has done something, at each start anew: until then the
    guest counts as standing still. `vcpus` and `stall` (a Histogram) are for reports.
    """

    kind: ClassVar[str]

    def __init__(self, *, vcpus: int = 1) -> None:
        self.vcpus = vcpus
        self.stall = Histogram()
        self.first_step_at: float | None = None
        self.last_step_at: float | None = None

    def stepped(self) -> None:
        """Note that a step was completed just now. Any thread may call it."""
        self.last_step_at = time.monotonic()
        if self.first_step_at is None:
            self.first_step_at = self.last_step_at

    @abstractmethod
    def start(self) -> None:
        """Let the vCPUs go on, without waiting for them. Set `first_step_at` to None where they ran before."""

    @abstractmethod
    def stop(self, deadline: float = 10.0) -> None:
        """Return when every vCPU is parked; PostcopyError where one is not after `deadline` seconds."""

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """Return all of the stopped guest but its memory, made of what msgpack carries."""

    def close(self) -> None:
        """End the vCPUs; the memory stays."""
        self.stop()


class KindFromState:
    """A kind of guest for which nothing but its memory is made ready: `load(mappings, state)` makes it, parked.

    load() must not touch the memory, and should be quick: the guest stands still meanwhile. `state` is what save() of
    the guest returned at the source; whoever may connect could have sent it, so what makes no sense is to be refused.
    """

    def __init__(self, load: Callable[[Sequence[Mapping], Any], MigratingGuest], *, vcpus_max: int = 1) -> None:
        self._load = load
        self.vcpus_max = vcpus_max

    def check_host(self) -> None:
        """Find nothing lacking."""

    def empty(self, mappings: Sequence[Mapping], _vcpus: int) -> EmptyGuest:
        """Keep the memory until the state comes."""
        return _OnlyMemory(mappings, self._load)


class _OnlyMemory:
    def __init__(self, mappings: Sequence[Mapping], load: Callable[[Sequence[Mapping], Any], MigratingGuest]) -> None:
        self._mappings = mappings
        self._load = load

    def load(self, state: object) -> MigratingGuest:
        return self._load(self._mappings, state)

    def close(self) -> None:
        """Give nothing back: the memory is the caller's."""
