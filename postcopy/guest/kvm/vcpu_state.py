"""A vCPU's whole state: read from KVM, checked as it arrives, put into a vCPU that was just made.

In: a vCPU's descriptor, or a map that came off the network and is believed in nothing. Out: the map that travels, or a
vCPU that goes on with the very next instruction. Most of it is KVM's own structures as they are, which its ABI keeps.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from postcopy.errors import KernelError, ProtocolError
from postcopy.guest.kvm import abi
from postcopy.guest.kvm.machine import Machine, get_msrs, set_msrs
from postcopy.guest.state import shown
from postcopy.kernel import calls

VcpuMap = dict[str, Any]

# Name, bytes, ioctl to get it, ioctl to set it; in the order in which they are set. The APIC's base is in sregs, so the
# APIC follows; its timer's deadline is a register of its own (MSR), which follows too.
_PARTS: dict[str, tuple[int, int, int]] = {
    "sregs": (abi.SREGS_BYTES, abi.GET_SREGS, abi.SET_SREGS),
    "lapic": (abi.LAPIC_BYTES, abi.GET_LAPIC, abi.SET_LAPIC),
    "regs": (abi.REGS_BYTES, abi.GET_REGS, abi.SET_REGS),
    "xcrs": (abi.XCRS_BYTES, abi.GET_XCRS, abi.SET_XCRS),
    "xsave": (abi.XSAVE_BYTES, abi.GET_XSAVE, abi.SET_XSAVE),
    "mp_state": (abi.MP_STATE_BYTES, abi.GET_MP_STATE, abi.SET_MP_STATE),
    "debugregs": (abi.DEBUGREGS_BYTES, abi.GET_DEBUGREGS, abi.SET_DEBUGREGS),
    "events": (abi.EVENTS_BYTES, abi.GET_VCPU_EVENTS, abi.SET_VCPU_EVENTS),
}


def part_bytes(machine: Machine) -> dict[str, int]:
    """Return how many bytes each part of a state has on this host."""
    return {name: machine.xsave_bytes if name == "xsave" else size for name, (size, _, _) in _PARTS.items()}


def save(machine: Machine, vcpu: int) -> VcpuMap:
    """Read the state of a vCPU that is not running."""
    descriptor = machine.vcpus[vcpu]
    state: VcpuMap = {}
    for name, size in part_bytes(machine).items():
        larger = size > _PARTS[name][0]  # an FPU with more than the first structure has room for
        state[name] = get_part(descriptor, name, size, abi.GET_XSAVE2 if larger else _PARTS[name][1])
    state["msrs"] = [list(one) for one in get_msrs(descriptor, list(machine.msrs)).items()]
    return state


def get_part(descriptor: int, name: str, size: int, request: int = 0) -> bytes:
    """Read one structure."""
    argument = bytearray(size)
    result = calls.ioctl(descriptor, request or _PARTS[name][1], argument)
    if result < 0:
        raise KernelError(f"reading {name} of a vCPU", -result)
    return bytes(argument)


def set_part(descriptor: int, name: str, data: bytes) -> None:
    """Write one structure; ProtocolError where KVM does not take it."""
    result = calls.ioctl(descriptor, _PARTS[name][2], bytearray(data))
    if result < 0:
        refusal = KernelError(f"setting {name} of a vCPU", -result)
        raise ProtocolError(f"guest state: {refusal}")


def parse(machine: Machine, state: object) -> VcpuMap:
    """Believe nothing: ProtocolError names what is wrong with a vCPU's state from the other agent."""
    if not isinstance(state, dict):
        raise ProtocolError(f"guest state: a vCPU is {shown(state)}, not a map")
    sizes = part_bytes(machine)
    if state.keys() != {*sizes, "msrs"}:
        odd = sorted(map(shown, state.keys() ^ {*sizes, "msrs"}))[:3]
        raise ProtocolError(f"guest state: missing or unknown parts of a vCPU: {', '.join(odd)}")
    for name, size in sizes.items():
        data = state[name]
        if type(data) is not bytes:
            raise ProtocolError(f"guest state: {name} of a vCPU is {shown(data)}, not bytes")
        if len(data) != size:
            raise ProtocolError(f"guest state: {name} of a vCPU has {len(data)} bytes, {size} on this host")
    return {**state, "msrs": _parse_msrs(machine, state["msrs"])}


def _parse_msrs(machine: Machine, msrs: object) -> list[tuple[int, int]]:
    if not isinstance(msrs, list) or len(msrs) > 4 * len(machine.msrs):
        raise ProtocolError(f"guest state: msrs of a vCPU are {shown(msrs)}, or too many")
    found: dict[int, int] = {}
    for one in msrs:
        if not isinstance(one, list) or len(one) != 2 or any(type(number) is not int for number in one):
            raise ProtocolError(f"guest state: an MSR is {shown(one)}, not [index, value]")
        index, value = one
        if not (0 <= index < 1 << 32 and 0 <= value < 1 << 64) or index in found:
            raise ProtocolError(f"guest state: MSR {shown(index)} with {shown(value)}, or twice")
        if index not in machine.msrs:
            raise ProtocolError(f"guest state: it has MSR {index:#x}, which this host's processors have not")
        if index in machine.fixed_msrs and value != machine.msrs[index]:
            raise ProtocolError(
                f"guest state: MSR {index:#x} is {value:#x}; on this host it is {machine.msrs[index]:#x} and stays so"
            )
        found[index] = value
    return [(index, value) for index, value in found.items() if index not in machine.fixed_msrs]


def load(machine: Machine, vcpu: int, state: VcpuMap) -> None:
    """Put a state that was parsed into a vCPU; ProtocolError where KVM does not take it."""
    descriptor = machine.vcpus[vcpu]
    for name in _PARTS:
        set_part(descriptor, name, state[name])
    msrs = state["msrs"]
    done = set_msrs(descriptor, msrs)
    if done != len(msrs):
        raise ProtocolError(f"guest state: KVM does not take {msrs[done][1]:#x} for MSR {msrs[done][0]:#x}")


def begin(machine: Machine, vcpu: int, registers: Mapping[str, int], level4_at: int) -> None:
    """Put a vCPU that was just made into long mode, with these registers and page tables; the others are zero."""
    descriptor = machine.vcpus[vcpu]
    sregs = bytearray(get_part(descriptor, "sregs", abi.SREGS_BYTES))
    for number, segment in enumerate(_SEGMENTS.values()):
        abi.SEGMENT.pack_into(sregs, number * abi.SEGMENT.size, *segment)
    *_, cr8, _efer, apic_base = abi.CONTROL.unpack_from(sregs, abi.CONTROL_OFFSET)
    control = (_CR0, 0, level4_at, _CR4, cr8, _EFER, apic_base)
    abi.CONTROL.pack_into(sregs, abi.CONTROL_OFFSET, *control)
    set_part(descriptor, "sregs", bytes(sregs))
    set_part(descriptor, "regs", abi.REGS.pack(*(registers.get(name, 0) for name in abi.REGISTERS)))
    set_part(descriptor, "mp_state", struct.pack("=I", abi.MP_STATE_RUNNABLE))


def registers_of(state: VcpuMap) -> dict[str, int]:
    """Return a saved vCPU's registers by name."""
    return dict(zip(abi.REGISTERS, abi.REGS.unpack(state["regs"]), strict=True))


_CR0 = 1 << 31 | 1 << 5 | 1 << 4 | 1 << 1 | 1  # paging, native errors, extension type, monitor, protection
_CR4 = 1 << 5  # physical addresses of more than 32 bits
_EFER = 1 << 10 | 1 << 8  # long mode, on and enabled
_CODE, _DATA, _TASK = 0xB, 0x3, 0xB
# base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable: all flat, the tables behind them never read
_FLAT = (0, 0xFFFFFFFF, 16, _DATA, 1, 0, 1, 1, 0, 1, 0, 0)
_SEGMENTS = {
    "cs": (0, 0xFFFFFFFF, 8, _CODE, 1, 0, 0, 1, 1, 1, 0, 0),
    **dict.fromkeys(("ds", "es", "fs", "gs", "ss"), _FLAT),
    "tr": (0, 0xFFFF, 0, _TASK, 1, 0, 0, 0, 0, 0, 0, 0),
    "ldt": (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1),
}
