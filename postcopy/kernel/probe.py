"""What this host can do, found out by trying: never by the kernel's version.

In: nothing, or what a migration is going to need. Out: a HostProbe to be shown, or a HostError that says what lacks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from postcopy.errors import HostError, KernelError
from postcopy.kernel.abi import NO_FEATURES, NO_IOCTLS, Feature, Ioctl, Mode
from postcopy.kernel.memory_type import MemoryType, TypeGrants, Way
from postcopy.kernel.opening import (
    OpenedBy,
    available_features,
    handshake,
    open_any_way,
    open_one_way,
    require_features,
    unprivileged_allowed,
)
from postcopy.kernel.types import MEMORY_TYPES


@dataclass(frozen=True, slots=True)
class WayToOpen:
    """One way to open a userfaultfd: `refusal` is None where it worked for this user, else the kernel's answer."""

    by: OpenedBy
    refusal: str | None


@dataclass(frozen=True, slots=True)
class HostProbe:
    """All that was tried. `features` and `ioctls` are empty where none could be opened, `refusal` then says why."""

    kernel: str
    user: int
    ways: tuple[WayToOpen, ...]
    unprivileged_userfaultfd: str
    features: Feature
    ioctls: Ioctl
    types: tuple[TypeGrants, ...]
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Need:
    """A memory type, the modes to be registered on it, the ways of placing its pages, and what is to work besides."""

    type: MemoryType
    modes: Mode
    ways: tuple[Way, ...]
    ioctls: Ioctl = NO_IOCTLS


def probe_host() -> HostProbe:
    """Try everything once; takes a few milliseconds and leaves nothing behind."""
    ways = tuple(_try_way(way) for way in OpenedBy if way is not OpenedBy.HANDED_OVER)
    features, ioctls, refusal = NO_FEATURES, Ioctl(0), None
    try:
        descriptor, _ = open_any_way(allow_user_mode_only=True)
    except (HostError, KernelError) as refused:
        refusal = str(refused)
    else:
        try:
            features, ioctls = handshake(descriptor, NO_FEATURES)
        finally:
            os.close(descriptor)
    return HostProbe(
        kernel=os.uname().release,
        user=os.geteuid(),
        ways=ways,
        unprivileged_userfaultfd=unprivileged_allowed(),
        features=features,
        ioctls=ioctls,
        types=tuple(known.probe(performing=True) for known in MEMORY_TYPES.values()),
        refusal=refusal,
    )


def _try_way(way: OpenedBy) -> WayToOpen:
    try:
        os.close(open_one_way(way))
    except KernelError as refused:
        return WayToOpen(way, str(refused))
    return WayToOpen(way, None)


def require(features: Feature = NO_FEATURES, needs: Iterable[Need] = (), *, allow_user_mode_only: bool = False) -> None:
    """Raise HostError unless this host has all of it: a destination asks before the guest is stopped.

    It asks for the features of the needs too, tries each need's modes on a page of its own, and performs its ioctls
    there, but for those that take a page of a memory that has none to spare. That there is memory enough is another
    question: MemoryType.check_room().
    """
    needs = tuple(needs)
    for need in needs:
        features |= need.type.features_for(need.modes)
    require_features(features, available_features(allow_user_mode_only=allow_user_mode_only))
    for need in needs:
        _require_grant(need)


def _require_grant(need: Need) -> None:
    modes, needed = name_modes(need.modes), need.type.ioctls_for(*need.ways) | need.ioctls
    grants = need.type.probe((need.modes,), performing=True)
    granted = grants.granted(need.modes)
    if granted is None:
        detail = grants.reason or f"refused with {os.strerror(grants.modes[0].number)}"
        raise HostError(f"{need.type.name} cannot be registered as {modes} on kernel {os.uname().release}: {detail}")
    refused = grants.modes[0].refused
    lacking = [
        f"is granted {_name(bit)} and refused it when it is performed ({refused[bit]})"
        if bit in refused
        else f"is not granted {_name(bit)}"
        for bit in needed
        if bit in refused or not bit & granted
    ]
    if lacking:
        raise HostError(f"{need.type.name} registered as {modes} {', '.join(lacking)} by kernel {os.uname().release}")


def _name(bit: Ioctl) -> str:
    return bit.name or hex(bit)


def name_modes(modes: Mode) -> str:
    """Return the modes as they are typed: "missing+minor"."""
    return "+".join((bit.name or hex(bit)).lower() for bit in modes)
