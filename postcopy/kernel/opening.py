"""Opening a userfaultfd: the ways there are, the features a kernel has, and what to say where neither is enough.

In: what the caller may do without and whether user-mode-only will do. Out: a descriptor whose API handshake is done.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from errno import EINVAL, EMFILE, ENFILE, ENOENT, ENOMEM, ENOSYS, ENXIO, EPERM
from pathlib import Path

from postcopy.errors import HostError, KernelError
from postcopy.kernel import abi, calls
from postcopy.kernel.abi import Feature, Ioctl

DEVICE = Path("/dev/userfaultfd")
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")

_EXHAUSTED = frozenset({EMFILE, ENFILE, ENOMEM})


class OpenedBy(StrEnum):
    """How a userfaultfd came to be. Only USER_MODE_ONLY is deaf to faults that the kernel itself raises.

    DEVICE: /dev/userfaultfd, Linux 6.1, permission by file mode. SYSCALL: userfaultfd(2), Linux 4.3, needs
    CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1 since 5.2. USER_MODE_ONLY: the same with a flag, Linux 5.11,
    anybody may; faults raised inside system calls and by KVM fail instead of being told. HANDED_OVER: it was
    opened elsewhere.
    """

    DEVICE = "/dev/userfaultfd"
    SYSCALL = "userfaultfd(2)"
    USER_MODE_ONLY = "userfaultfd(2), user mode only"
    HANDED_OVER = "handed over"


@dataclass(frozen=True, slots=True)
class Opened:
    """A descriptor after its handshake: `features` are those enabled on it, `ioctls` the general ones granted."""

    descriptor: int
    by: OpenedBy
    features: Feature
    ioctls: Ioctl


def open_one_way(way: OpenedBy, *, blocking: bool = False) -> int:
    """Open a userfaultfd in one given way, without a handshake; KernelError with the errno where that fails."""
    flags = os.O_CLOEXEC | (0 if blocking else os.O_NONBLOCK)
    if way is OpenedBy.DEVICE:
        return _open_device(flags)
    if way is OpenedBy.SYSCALL:
        return calls.new_userfaultfd(flags)
    if way is OpenedBy.USER_MODE_ONLY:
        return calls.new_userfaultfd(flags | abi.USER_MODE_ONLY)
    raise ValueError(f"{way}: not a way to open one")


def _open_device(flags: int) -> int:
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as refused:
        raise KernelError(f"open {DEVICE}", refused.errno or EINVAL) from refused
    try:
        descriptor = calls.ioctl_value(device, abi.IOC_NEW, flags)
    finally:
        os.close(device)
    if descriptor < 0:
        raise KernelError("USERFAULTFD_IOC_NEW", -descriptor)
    return descriptor


def open_any_way(*, allow_user_mode_only: bool = False, blocking: bool = False) -> tuple[int, OpenedBy]:
    """Open a userfaultfd by the device, else the system call, else user-mode-only where that is allowed.

    Raises HostError that names what was tried and the ways to mend it; KernelError where descriptors or memory ran
    out, since another way would not help.
    """
    refusals: list[KernelError] = []
    ways = [OpenedBy.DEVICE, OpenedBy.SYSCALL, *([OpenedBy.USER_MODE_ONLY] if allow_user_mode_only else [])]
    for way in ways:
        try:
            return open_one_way(way, blocking=blocking), way
        except KernelError as refused:
            if refused.number in _EXHAUSTED:
                raise
            refusals.append(refused)
    raise HostError(_explain(refusals)) from refusals[-1]


def _explain(refusals: list[KernelError]) -> str:
    tried = "; ".join(str(refused) for refused in refusals)
    if any(refused.number == ENOSYS for refused in refusals):
        return f"this kernel has no userfaultfd (built without CONFIG_USERFAULTFD): {tried}"
    no_device = refusals[0].number in {ENOENT, ENXIO}
    device = f"{DEVICE} is missing here (Linux 6.1 has it)" if no_device else f"setfacl -m u:{os.geteuid()}:rw {DEVICE}"
    return (
        f"user {os.geteuid()} may not open a userfaultfd: {tried}. As root, one of: {device}; "
        f"sysctl vm.unprivileged_userfaultfd=1 (now {unprivileged_allowed()}); "
        "start this program with CAP_SYS_PTRACE"
    )


def unprivileged_allowed() -> str:
    """Return the value of vm.unprivileged_userfaultfd as the kernel shows it, "unknown" where it has none."""
    try:
        return SYSCTL.read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"


def handshake(descriptor: int, features: Feature) -> tuple[Feature, Ioctl]:
    """Perform UFFDIO_API, once for each descriptor: the features this kernel has, and the general ioctls.

    `features` are enabled, and only these. Raises KernelError: EINVAL where a feature is unknown or the handshake
    was done before, EPERM for EVENT_FORK without CAP_SYS_PTRACE.
    """
    argument = bytearray(abi.API_ARGUMENT.pack(abi.API, features, 0))
    result = calls.ioctl(descriptor, abi.IOC_API, argument)
    if result < 0:
        raise KernelError("UFFDIO_API", -result, f"features {features!r}")
    _, offered, ioctls = abi.API_ARGUMENT.unpack(argument)
    return Feature(offered), Ioctl(ioctls)


def available_features(*, allow_user_mode_only: bool = False) -> Feature:
    """Return the features that this kernel has, asked on a descriptor that is thrown away.

    A handshake fixes the features of its descriptor for good, so the one that is to be used cannot be asked.
    """
    descriptor, _ = open_any_way(allow_user_mode_only=allow_user_mode_only)
    try:
        offered, _ = handshake(descriptor, Feature(0))
    finally:
        os.close(descriptor)
    return offered


def negotiate(
    required: Feature, optional: Feature, *, allow_user_mode_only: bool = False, blocking: bool = False
) -> Opened:
    """Open a userfaultfd with all `required` features and those of the `optional` ones that can be had.

    Raises HostError naming the features that are lacking.
    """
    offered = available_features(allow_user_mode_only=allow_user_mode_only)
    require_features(required, offered)
    descriptor, by = open_any_way(allow_user_mode_only=allow_user_mode_only, blocking=blocking)
    wanted = required | (optional & offered)
    try:
        try:
            _, ioctls = handshake(descriptor, wanted)
        except KernelError as refused:
            if refused.number != EPERM or not wanted & Feature.EVENT_FORK:
                raise
            if required & Feature.EVENT_FORK:
                raise HostError("userfaultfd's EVENT_FORK needs CAP_SYS_PTRACE") from refused
            wanted &= ~Feature.EVENT_FORK
            _, ioctls = handshake(descriptor, wanted)
    except BaseException:
        os.close(descriptor)
        raise
    return Opened(descriptor, by, wanted, ioctls)


def require_features(required: Feature, offered: Feature) -> None:
    """Raise HostError that names the features which are required and not offered."""
    # As plain numbers: the complement of a flag has no bits but the named ones.
    lacking = int(required) & ~int(offered)
    if lacking:
        raise HostError(f"kernel {os.uname().release} lacks userfaultfd's {name_features(lacking)}")


def name_features(features: int) -> str:
    """Return the names of the features, those without a name by their number."""
    bits = (bit for bit in range(features.bit_length()) if features >> bit & 1)
    return ", ".join(Feature(1 << bit).name or f"bit {bit}" for bit in bits)
