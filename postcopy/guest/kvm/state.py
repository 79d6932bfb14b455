"""The device state of a guest that KVM runs: its program's numbers, its machine, every vCPU as a whole.

In: a machine whose vCPUs stand still, or a map that came off the network and is believed in nothing. Out: the map that
travels, or a state that is known to fit a machine, ready to be put into it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from postcopy.errors import KernelError, ProtocolError
from postcopy.guest.kvm import abi, vcpu_state
from postcopy.guest.kvm.machine import Machine
from postcopy.guest.state import GuestState, Position, opened, shown
from postcopy.kernel import calls

KIND = "kvm"
VERSION = 1
VERSION_MIN = 1

# What the program knows; zipf takes more instructions than it was worth.
WORKLOADS = ("sequential", "stride", "random", "increment")

_FIELDS = {
    "program": dict,
    "cpuid": list,
    "tsc_khz": int,
    "time_stamps": list,
    "clock": int,
    "irqchips": list,
    "vcpus": list,
}


@dataclass(frozen=True, slots=True)
class KvmState:
    """A state that fits the machine it was parsed for.

    `time_stamps` are those of all vCPUs at one moment, `clock` is in nanoseconds, `irqchips` are KVM's structures.
    """

    program: GuestState
    time_stamps: list[int]
    clock: int
    irqchips: list[bytes]
    vcpus: list[vcpu_state.VcpuMap]

    @staticmethod
    def save(machine: Machine, program: GuestState, steps_max: int | None) -> dict[str, Any]:
        """Read the state of a machine whose vCPUs stand still."""
        vcpus = [vcpu_state.save(machine, vcpu) for vcpu in range(len(machine.vcpus))]
        made = [vcpu_state.registers_of(one)["r8"] for one in vcpus]
        positions = tuple(Position(*divmod(steps, program.pass_steps), steps) for steps in made)
        return {
            "kind": KIND,
            "version": VERSION,
            "program": program.at(positions, steps_max).to_fields(),
            "cpuid": [list(entry) for entry in machine.cpuid],
            "tsc_khz": machine.tsc_khz,
            "time_stamps": machine.time_stamps(),
            "clock": _get_clock(machine),
            "irqchips": [_get_irqchip(machine, number) for number in range(abi.IRQCHIPS)],
            "vcpus": vcpus,
        }

    @classmethod
    def parse(cls, state: object, machine: Machine, pages: int) -> KvmState:
        """Believe nothing: ProtocolError names what is wrong, or what of the processor is another here."""
        _, fields = opened(state, KIND, (VERSION_MIN, VERSION))
        if fields.keys() != _FIELDS.keys():
            odd = sorted(map(shown, fields.keys() ^ _FIELDS.keys()))[:3]
            raise ProtocolError(f"guest state: missing or unknown fields: {', '.join(odd)}")
        for name, kind in _FIELDS.items():
            if type(fields[name]) is not kind:
                raise ProtocolError(f"guest state: {name} is {shown(fields[name])}")
        program = _parse_program(fields["program"], machine, pages)
        _check_processor(fields, machine)
        _check_times([fields["clock"], *fields["time_stamps"]], len(program.vcpus))
        vcpus = _parse_vcpus(fields["vcpus"], program, machine)
        return cls(program, fields["time_stamps"], fields["clock"], _parse_irqchips(fields["irqchips"]), vcpus)

    def load(self, machine: Machine) -> None:
        """Put the state into a machine that was just made; ProtocolError where KVM does not take it."""
        for number, chip in enumerate(self.irqchips):
            argument = bytearray(abi.IRQCHIP_HEAD.pack(number) + chip)
            _must_take("irqchip", calls.ioctl(machine.fd, abi.SET_IRQCHIP, argument))
        for vcpu, state in enumerate(self.vcpus):
            vcpu_state.load(machine, vcpu, state)
        machine.set_time_stamps(self.time_stamps)
        clock = bytearray(struct.pack("=Q", self.clock).ljust(abi.CLOCK_BYTES, b"\0"))
        _must_take("clock", calls.ioctl(machine.fd, abi.SET_CLOCK, clock))


def _parse_program(fields: object, machine: Machine, pages: int) -> GuestState:
    program = GuestState.from_fields(fields)
    if program.workload not in WORKLOADS:
        raise ProtocolError(f"guest state: its program does not know the workload {program.workload}")
    if program.guest_pages != pages:
        raise ProtocolError(f"guest state: it is of {program.guest_pages} guest pages, the memory here has {pages}")
    if len(program.vcpus) != len(machine.vcpus):
        raise ProtocolError(f"guest state: {len(program.vcpus)} vCPUs, and {len(machine.vcpus)} were announced")
    return program


def _parse_vcpus(vcpus: list[object], program: GuestState, machine: Machine) -> list[vcpu_state.VcpuMap]:
    if len(vcpus) != len(program.vcpus):
        raise ProtocolError(f"guest state: the program is of {len(program.vcpus)} vCPUs, the machine of {len(vcpus)}")
    parsed = [vcpu_state.parse(machine, one) for one in vcpus]
    for number, (vcpu, position) in enumerate(zip(parsed, program.vcpus, strict=True)):
        if vcpu_state.registers_of(vcpu)["r8"] != position.steps:
            raise ProtocolError(f"guest state: vCPU {number}: its registers say other steps than its position")
    return parsed


def _check_times(times: list[object], vcpus: int) -> None:
    if len(times) != 1 + vcpus:
        raise ProtocolError(f"guest state: {len(times) - 1} time stamps of {vcpus} vCPUs")
    for time in times:
        if type(time) is not int or not 0 <= time < 1 << 64:
            raise ProtocolError(f"guest state: a clock or time stamp is {shown(time)}")


def _check_processor(fields: dict[str, Any], machine: Machine) -> None:
    """Raise ProtocolError unless a guest that has looked at its processor finds the same one here, bit by bit."""
    if fields["tsc_khz"] != machine.tsc_khz:
        raise ProtocolError(
            f"guest state: its time stamps count {shown(fields['tsc_khz'])} kHz, here it is {machine.tsc_khz} kHz"
        )
    here = {(entry[0], entry[1]): list(entry[2:]) for entry in machine.cpuid}
    there: dict[tuple[int, int], list[int]] = {}
    for entry in fields["cpuid"]:
        if not isinstance(entry, list) or len(entry) != 7 or any(type(number) is not int for number in entry):
            raise ProtocolError(f"guest state: an entry of cpuid is {shown(entry)}, not seven numbers")
        there[entry[0], entry[1]] = entry[2:]
    for leaf, index in sorted(here.keys() | there.keys()):
        if here.get((leaf, index)) != there.get((leaf, index)):
            where = f"leaf {leaf:#x}" + (f", {index}" if index else "")
            raise ProtocolError(f"guest state: its processor is another one than this host's (CPUID {where} differs)")


def _parse_irqchips(chips: list[object]) -> list[bytes]:
    wanted = abi.IRQCHIP_BYTES - abi.IRQCHIP_HEAD.size
    found = [chip for chip in chips[: abi.IRQCHIPS] if type(chip) is bytes and len(chip) == wanted]
    if len(found) != len(chips) or len(chips) != abi.IRQCHIPS:
        raise ProtocolError(f"guest state: irqchips are not {abi.IRQCHIPS} times {wanted} bytes")
    return found


def _get_irqchip(machine: Machine, number: int) -> bytes:
    argument = bytearray(abi.IRQCHIP_HEAD.pack(number).ljust(abi.IRQCHIP_BYTES, b"\0"))
    _must("KVM_GET_IRQCHIP", calls.ioctl(machine.fd, abi.GET_IRQCHIP, argument))
    return bytes(argument[abi.IRQCHIP_HEAD.size :])


def _get_clock(machine: Machine) -> int:
    argument = bytearray(abi.CLOCK_BYTES)
    _must("KVM_GET_CLOCK", calls.ioctl(machine.fd, abi.GET_CLOCK, argument))
    return int(struct.unpack_from("=Q", argument)[0])


def _must(operation: str, result: int) -> None:
    if result < 0:
        raise KernelError(operation, -result)


def _must_take(what: str, result: int) -> None:
    if result < 0:
        raise ProtocolError(f"guest state: {KernelError(f'setting the {what}', -result)}")
