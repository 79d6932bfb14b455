"""A virtual machine on mapped memory, without a guest in it yet: everything about it that takes time or can fail.

In: mappings, a number of vCPUs. Out: descriptors of vCPUs that can be loaded with a state and run; what this host's
processors are to a guest. Nothing here touches the guest's memory, so nothing waits for a page of it.
"""

from __future__ import annotations

import errno
import mmap
import os
import platform
import struct
from collections.abc import Sequence
from typing import Any

from postcopy.errors import HostError, KernelError
from postcopy.guest._guest import ffi
from postcopy.guest.kvm import abi
from postcopy.guest.kvm.layout import MEMORY_AT, WINDOWS_AT
from postcopy.guest.vcpus import GuestMemory
from postcopy.kernel import calls
from postcopy.kernel.kvm import DEVICE, probe_kvm
from postcopy.limits import KVM_CPUID_ENTRIES_MAX, KVM_MSRS_MAX

# A window's distance from the next: no two vCPUs on one page.
WINDOW_BYTES = -(-ffi.sizeof("struct kvm_window") // mmap.PAGESIZE) * mmap.PAGESIZE

# Where KVM may put a task state segment of its own, for Intel processors that cannot do without: below 4 GiB.
_TSS_AT = 0xFFFBD000

_NEEDED = {
    "KVM_CAP_IRQCHIP": abi.CAP_IRQCHIP,
    "KVM_CAP_USER_MEMORY": abi.CAP_USER_MEMORY,
    "KVM_CAP_MP_STATE": abi.CAP_MP_STATE,
    "KVM_CAP_SET_GUEST_DEBUG": abi.CAP_SET_GUEST_DEBUG,
    "KVM_CAP_ADJUST_CLOCK": abi.CAP_ADJUST_CLOCK,
    "KVM_CAP_VCPU_EVENTS": abi.CAP_VCPU_EVENTS,
    "KVM_CAP_DEBUGREGS": abi.CAP_DEBUGREGS,
    "KVM_CAP_XSAVE": abi.CAP_XSAVE,
    "KVM_CAP_XCRS": abi.CAP_XCRS,
    "KVM_CAP_GET_TSC_KHZ": abi.CAP_GET_TSC_KHZ,
    "KVM_CAP_IMMEDIATE_EXIT": abi.CAP_IMMEDIATE_EXIT,
}

# A guest sees no hypervisor and has nothing of one: no registers whose setting makes KVM write to its memory.
_HYPERVISOR_LEAVES = range(0x40000000, 0x50000000)
_HYPERVISOR_MSRS = (range(0x40000000, 0x40001000), range(0x4B564D00, 0x4B564E00), range(0x11, 0x13))
_TOPOLOGY_LEAVES = {0x0B, 0x1F}
_SVM_LEAF = 0x8000000A
_U64 = 1 << 64
_FAR = 1 << 40

CpuidEntry = tuple[int, int, int, int, int, int, int]


def check_host() -> None:
    """Raise HostError where this host, or this user, cannot make such a machine."""
    if platform.machine() != "x86_64":
        raise HostError(f"a guest of KVM: this host is {platform.machine()}, its program is for x86_64")
    refusal = probe_kvm().refusal
    if refusal is not None:
        raise HostError(f"a guest of KVM: no virtual machine can be made: {refusal}")
    device = _open_device()
    try:
        answers = {name: calls.ioctl_value(device, abi.CHECK_EXTENSION, number) for name, number in _NEEDED.items()}
    finally:
        os.close(device)
    lacking = [name for name, answer in answers.items() if answer < 1]
    if lacking:
        raise HostError(f"a guest of KVM: this kernel's KVM lacks {', '.join(lacking)}")


class Machine:
    """The machine; `vcpus` are descriptors, `windows` the memory of struct kvm_window, WINDOW_BYTES apart.

    `cpuid` is what every vCPU is told of its processor, but for its own number. `msrs` are the model-specific registers
    of a vCPU that was just made, by index; those in `fixed_msrs` cannot be set. The time stamp is not among them: KVM
    takes a value set there for an attempt to make it run along with the others', and may set another one. It is set by
    its offset from this host's; `own_time` says whether that has an effect: without hardware that helps, it has none.
    """

    def __init__(self, mappings: Sequence[GuestMemory], vcpus: int) -> None:
        self.vcpus: list[int] = []
        self.windows = mmap.mmap(-1, vcpus * WINDOW_BYTES)
        self._descriptors: list[int] = []
        try:
            device = self._keep(_open_device())
            self.xsave_bytes = max(abi.XSAVE_BYTES, calls.ioctl_value(device, abi.CHECK_EXTENSION, abi.CAP_XSAVE2))
            self.run_bytes = _value("KVM_GET_VCPU_MMAP_SIZE", device, abi.GET_VCPU_MMAP_SIZE)
            self.cpuid = _supported_cpuid(device)
            indices = _msr_indices(device)
            self.fd = self._keep(_value("KVM_CREATE_VM", device, abi.CREATE_VM))
            _value("KVM_SET_TSS_ADDR", self.fd, abi.SET_TSS_ADDR, _TSS_AT)
            _value("KVM_CREATE_IRQCHIP", self.fd, abi.CREATE_IRQCHIP)
            self._plug_in(mappings)
            for vcpu in range(vcpus):
                self.vcpus.append(self._keep(_value("KVM_CREATE_VCPU", self.fd, abi.CREATE_VCPU, vcpu)))
                _call("KVM_SET_CPUID2", self.vcpus[vcpu], abi.SET_CPUID2, _packed_cpuid(self.cpuid, vcpu))
            self.tsc_khz = _value("KVM_GET_TSC_KHZ", self.vcpus[0], abi.GET_TSC_KHZ)
            self.msrs = get_msrs(self.vcpus[0], [index for index in indices if index != abi.MSR_TSC])
            self.own_time = _can_set_offset(self.vcpus[0])
            self.fixed_msrs = frozenset(i for i, value in self.msrs.items() if not _can_set(self.vcpus[0], i, value))
        except KernelError as refused:
            self.close()
            raise HostError(f"a guest of KVM: {refused}") from refused
        except BaseException:
            self.close()
            raise

    def _keep(self, descriptor: int) -> int:
        self._descriptors.append(descriptor)
        return descriptor

    def _plug_in(self, mappings: Sequence[GuestMemory]) -> None:
        """Give the machine its memory: a slot for the windows, one for each region, one after the other."""
        with calls.pinned(self.windows) as address:  # type: ignore[arg-type]
            slots = [(WINDOWS_AT, len(self.windows), address)]
        at = MEMORY_AT
        for mapping in mappings:
            slots.append((at, mapping.region.size, mapping.address))
            at += mapping.region.size
        for number, slot in enumerate(slots):
            argument = bytearray(abi.MEMORY_REGION.pack(number, 0, *slot))
            _call("KVM_SET_USER_MEMORY_REGION", self.fd, abi.SET_USER_MEMORY_REGION, argument)

    def window(self, vcpu: int) -> Any:
        """Return a vCPU's window, for C; it lives as long as the machine."""
        return ffi.cast("struct kvm_window *", ffi.from_buffer(self.windows) + vcpu * WINDOW_BYTES)

    def time_stamps(self) -> list[int]:
        """Return every vCPU's time stamp of one and the same moment."""
        first, *others = [_get_offset(vcpu) for vcpu in self.vcpus]
        now = get_msrs(self.vcpus[0], [abi.MSR_TSC])[abi.MSR_TSC]
        return [now, *((now + other - first) % _U64 for other in others)]

    def set_time_stamps(self, stamps: Sequence[int]) -> None:
        """Have the vCPUs' time stamps be these at one and the same moment: now; nothing where they are this host's."""
        if not self.own_time:
            return
        offset = _get_offset(self.vcpus[0])
        now = get_msrs(self.vcpus[0], [abi.MSR_TSC])[abi.MSR_TSC]
        for vcpu, stamp in zip(self.vcpus, stamps, strict=True):
            _set_offset(vcpu, (offset + stamp - now) % _U64)

    def close(self) -> None:
        """End the machine. Whoever runs it has ended before; the memory stays."""
        for descriptor in reversed(self._descriptors):
            os.close(descriptor)
        self._descriptors.clear()
        self.vcpus.clear()


def get_msrs(vcpu: int, indices: Sequence[int]) -> dict[int, int]:
    """Read these of a vCPU's model-specific registers; those that it does not have are left out."""
    found: dict[int, int] = {}
    rest = list(indices)
    while rest:
        argument = _packed_msrs([(index, 0) for index in rest])
        done = _call("KVM_GET_MSRS", vcpu, abi.GET_MSRS, argument)
        for number in range(done):
            index, value = abi.MSR_ENTRY.unpack_from(argument, abi.MSRS_HEAD.size + number * abi.MSR_ENTRY.size)
            found[index] = value
        rest = rest[done + 1 :]  # the one after those that were read cannot be
    return found


def set_msrs(vcpu: int, msrs: Sequence[tuple[int, int]]) -> int:
    """Set them in this order up to the first that cannot be; return how many were."""
    return _call("KVM_SET_MSRS", vcpu, abi.SET_MSRS, _packed_msrs(msrs))


def _get_offset(vcpu: int) -> int:
    """Return by how much a vCPU's time stamp is ahead of this host's."""
    value = bytearray(8)
    with calls.pinned(value) as address:
        argument = bytearray(abi.DEVICE_ATTR.pack(0, abi.VCPU_TSC_CTRL, abi.VCPU_TSC_OFFSET, address))
        _call("KVM_GET_DEVICE_ATTR of KVM_VCPU_TSC_OFFSET", vcpu, abi.GET_DEVICE_ATTR, argument)
    return int.from_bytes(value, "little")


def _set_offset(vcpu: int, offset: int) -> None:
    with calls.pinned(offset.to_bytes(8, "little")) as address:
        argument = bytearray(abi.DEVICE_ATTR.pack(0, abi.VCPU_TSC_CTRL, abi.VCPU_TSC_OFFSET, address))
        _call("KVM_SET_DEVICE_ATTR of KVM_VCPU_TSC_OFFSET", vcpu, abi.SET_DEVICE_ATTR, argument)


def _can_set_offset(vcpu: int) -> bool:
    former = _get_offset(vcpu)
    _set_offset(vcpu, (former + _FAR) % _U64)
    moved = _get_offset(vcpu) != former
    _set_offset(vcpu, former)
    return moved


def _can_set(vcpu: int, index: int, value: int) -> bool:
    return set_msrs(vcpu, [(index, value)]) == 1


def _packed_msrs(msrs: Sequence[tuple[int, int]]) -> bytearray:
    return bytearray(abi.MSRS_HEAD.pack(len(msrs)) + b"".join(abi.MSR_ENTRY.pack(*one) for one in msrs))


def _msr_indices(device: int) -> list[int]:
    argument = bytearray(abi.COUNT.pack(KVM_MSRS_MAX) + bytes(KVM_MSRS_MAX * abi.COUNT.size))
    _call("KVM_GET_MSR_INDEX_LIST", device, abi.GET_MSR_INDEX_LIST, argument)
    (count,) = abi.COUNT.unpack_from(argument)
    indices = struct.unpack_from(f"={count}I", argument, abi.COUNT.size)
    return [index for index in indices if not any(index in taboo for taboo in _HYPERVISOR_MSRS)]


def _supported_cpuid(device: int) -> list[CpuidEntry]:
    """Return what a guest may be told of this host's processors, without what differs between two of them."""
    size = abi.CPUID_HEAD.size + KVM_CPUID_ENTRIES_MAX * abi.CPUID_ENTRY.size
    argument = bytearray(abi.CPUID_HEAD.pack(KVM_CPUID_ENTRIES_MAX).ljust(size, b"\0"))
    _call("KVM_GET_SUPPORTED_CPUID", device, abi.GET_SUPPORTED_CPUID, argument)
    (count,) = abi.CPUID_HEAD.unpack_from(argument)
    at = (abi.CPUID_HEAD.size + n * abi.CPUID_ENTRY.size for n in range(count))
    entries = [abi.CPUID_ENTRY.unpack_from(argument, offset) for offset in at]
    return [_as_seen(entry, 0) for entry in entries if entry[0] not in _HYPERVISOR_LEAVES]


def _as_seen(entry: Sequence[int], vcpu: int) -> CpuidEntry:
    """Return what this vCPU is told: its own number, and that it cannot run machines of its own."""
    function, index, flags, eax, ebx, ecx, edx = entry
    if function == 0x1:
        ebx, ecx = ebx & 0x00FFFFFF | vcpu << 24, ecx & ~(1 << 5)
    elif function in _TOPOLOGY_LEAVES:
        edx = vcpu
    elif function == 0x80000001:
        ecx &= ~(1 << 2)
    elif function == 0x8000001E:
        eax, ebx, ecx = vcpu, ebx & ~0xFF, ecx & ~0xFF  # without the core and the node that answered
    elif function == _SVM_LEAF:
        eax = ebx = ecx = edx = 0
    return function, index, flags, eax, ebx, ecx, edx


def _packed_cpuid(entries: Sequence[CpuidEntry], vcpu: int) -> bytearray:
    packed = (abi.CPUID_ENTRY.pack(*_as_seen(entry, vcpu)) for entry in entries)
    return bytearray(abi.CPUID_HEAD.pack(len(entries)) + b"".join(packed))


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as refused:
        raise HostError(f"a guest of KVM: {KernelError(f'open {DEVICE}', refused.errno or errno.EIO)}") from refused


def _call(operation: str, descriptor: int, request: int, argument: bytearray) -> int:
    result = calls.ioctl(descriptor, request, argument)
    if result < 0:
        raise KernelError(operation, -result)
    return result


def _value(operation: str, descriptor: int, request: int, value: int = 0) -> int:
    result = calls.ioctl_value(descriptor, request, value)
    if result < 0:
        raise KernelError(operation, -result)
    return result
