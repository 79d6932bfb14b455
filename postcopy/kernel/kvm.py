"""KVM, tried once: whether this host lets this user make a virtual machine. Its guest memory is in `guest_memfd.py`.

In: nothing. Out: a KvmProbe. Source: Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path

from postcopy.errors import KernelError
from postcopy.kernel import calls
from postcopy.kernel.abi import ioc

DEVICE = Path("/dev/kvm")

_TYPE_KVM = 0xAE
_READ, _WRITE = 2, 1
_CREATE_BYTES = struct.calcsize("=8Q")  # struct kvm_create_guest_memfd

IOC_GET_API_VERSION = ioc(0, _TYPE_KVM, 0x00, 0)
IOC_CREATE_VM = ioc(0, _TYPE_KVM, 0x01, 0)
IOC_CREATE_GUEST_MEMFD = ioc(_READ | _WRITE, _TYPE_KVM, 0xD4, _CREATE_BYTES)

assert IOC_GET_API_VERSION == 0xAE00  # noqa: S101 - facts of the ABI
assert IOC_CREATE_VM == 0xAE01  # noqa: S101
assert IOC_CREATE_GUEST_MEMFD == 0xC040AED4  # noqa: S101


@dataclass(frozen=True, slots=True)
class KvmProbe:
    """`refusal` is None where a virtual machine could be made, else the kernel's answer; `api_version` is 0 then."""

    refusal: str | None
    api_version: int


def probe_kvm() -> KvmProbe:
    """Make a virtual machine and throw it away; never raises."""
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as refused:
        return KvmProbe(str(KernelError(f"open {DEVICE}", refused.errno or EINVAL)), 0)
    try:
        version = _call("KVM_GET_API_VERSION", device, IOC_GET_API_VERSION)
        os.close(_call("KVM_CREATE_VM", device, IOC_CREATE_VM))
    except KernelError as refused:
        return KvmProbe(str(refused), 0)
    finally:
        os.close(device)
    return KvmProbe(None, version)


def _call(operation: str, descriptor: int, request: int) -> int:
    result = calls.ioctl_value(descriptor, request, 0)
    if result < 0:
        raise KernelError(operation, -result)
    return result
