"""The kinds of guest that an agent can run, by name: what `source` makes one of, and what a destination takes.

In: where vCPUs may run. Out: the registry. A new kind is one class here, with what `postcopy.link.guest.GuestKind` asks
for and a way to make a guest that has not begun.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping as ReadOnly
from collections.abc import Sequence
from typing import Any

from postcopy.errors import UsageError
from postcopy.guest.emulated import Guest
from postcopy.guest.kvm.guest import EmptyKvm, KvmGuest, wanted_kvm
from postcopy.guest.kvm.machine import check_host
from postcopy.guest.state import wanted_state
from postcopy.guest.vcpus import GuestMemory, WorkloadGuest


class EmptyEmulated:
    """An emulated guest of so many vCPUs, parked, that becomes the one that comes.

    The guest that comes stands still meanwhile, so its threads are here by then, and the way was gone once.
    """

    def __init__(self, mappings: Sequence[GuestMemory], vcpus: int, cpus: Sequence[int]) -> None:
        self._guest: Guest | None = Guest(mappings, vcpus=vcpus, cpus=cpus, blank=0.0)
        self._guest.become(self._guest.save())

    def load(self, state: object) -> Guest:
        """Let it become the guest of this state."""
        assert self._guest is not None  # noqa: S101 - called once
        self._guest.become(state)
        guest, self._guest = self._guest, None
        return guest

    def close(self) -> None:
        """End the threads, unless they are a guest's by now."""
        if self._guest is not None:
            self._guest.close()
            self._guest = None


EmptyGuest = EmptyEmulated | EmptyKvm


class WorkloadKind(ABC):
    """A kind of guest that runs a workload. `cpus` pins vCPU v to cpus[v % len(cpus)]."""

    name: str
    vcpus_max: int

    def __init__(self, cpus: Sequence[int] = ()) -> None:
        self._cpus = cpus

    @abstractmethod
    def check_host(self) -> None:
        """Raise HostError where this host can have no such guest."""

    @staticmethod
    @abstractmethod
    def judge(pages: int, **options: Any) -> None:
        """Raise UsageError where no guest on so many pages can be as the options of its class say, on any host."""

    @abstractmethod
    def create(self, mappings: Sequence[GuestMemory], **options: Any) -> WorkloadGuest:
        """Make a guest that has not begun, as the options of its class say."""

    @abstractmethod
    def empty(self, mappings: Sequence[GuestMemory], vcpus: int) -> EmptyGuest:
        """Make ready what a guest that comes will need beside its memory."""


class EmulatedKind(WorkloadKind):
    """vCPUs that are threads of this project's own code; any host can have them."""

    name = Guest.kind
    vcpus_max = Guest.vcpus_max

    def check_host(self) -> None:
        """Find nothing lacking."""

    @staticmethod
    def judge(pages: int, **options: Any) -> None:
        """Refuse what such a guest cannot be."""
        wanted_state(pages, **options)

    def create(self, mappings: Sequence[GuestMemory], **options: Any) -> Guest:
        """Make a guest that has not begun."""
        return Guest(mappings, cpus=self._cpus, **options)

    def empty(self, mappings: Sequence[GuestMemory], vcpus: int) -> EmptyEmulated:
        """Rehearse its making."""
        return EmptyEmulated(mappings, vcpus, self._cpus)


class KvmKind(WorkloadKind):
    """vCPUs of KVM, for whom /dev/kvm is open."""

    name = KvmGuest.kind
    vcpus_max = KvmGuest.vcpus_max

    def check_host(self) -> None:
        """Make a virtual machine and throw it away."""
        check_host()

    @staticmethod
    def judge(pages: int, **options: Any) -> None:
        """Refuse what such a guest cannot be."""
        wanted_kvm(pages, **options)

    def create(self, mappings: Sequence[GuestMemory], **options: Any) -> KvmGuest:
        """Make a guest that has not begun."""
        return KvmGuest(mappings, cpus=self._cpus, **options)

    def empty(self, mappings: Sequence[GuestMemory], vcpus: int) -> EmptyKvm:
        """Make the whole machine: it takes milliseconds, in which no guest stands still yet."""
        return EmptyKvm(mappings, vcpus, self._cpus)


KINDS: dict[str, type[WorkloadKind]] = {kind.name: kind for kind in (EmulatedKind, KvmKind)}


def kinds(cpus: Sequence[int] = ()) -> ReadOnly[str, WorkloadKind]:
    """Return every kind by name, those that this host cannot have among them: they say why not."""
    return {name: kind(cpus) for name, kind in KINDS.items()}


def kind_named(name: str, cpus: Sequence[int] = ()) -> WorkloadKind:
    """Return the kind of this name; UsageError names those that there are."""
    if name not in KINDS:
        raise UsageError(f"unknown kind of guest {name!r}: known are {', '.join(KINDS)}")
    return KINDS[name](cpus)
