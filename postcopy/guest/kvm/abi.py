"""KVM's ABI on x86-64, as far as a small virtual machine needs it: numbers of ioctls, layouts, bits of the processor.

In: nothing. Out: constants. A test compares them with the header of the machine that builds.
Sources: Documentation/virt/kvm/api.rst and the processor manuals' chapters on long mode.
"""

from __future__ import annotations

import struct

from postcopy.kernel.abi import ioc

_TYPE = 0xAE
_READ, _WRITE = 2, 1

# What is sent and saved as it is, by size.
REGS_BYTES = 144
SREGS_BYTES = 312
XSAVE_BYTES = 4096  # the least; KVM_CAP_XSAVE2 says how much it is
XCRS_BYTES = 392
EVENTS_BYTES = 64
MP_STATE_BYTES = 4
LAPIC_BYTES = 1024
DEBUGREGS_BYTES = 128
IRQCHIP_BYTES = 520
CLOCK_BYTES = 48

# Layouts of what is looked into.
REGS = struct.Struct("=18Q")
SEGMENT = struct.Struct("=QIH9Bx")  # base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable
CONTROL = struct.Struct("=7Q")  # cr0, cr2, cr3, cr4, cr8, efer, apic_base; in sregs after segments and tables
CONTROL_OFFSET = 8 * SEGMENT.size + 2 * 16
MEMORY_REGION = struct.Struct("=IIQQQ")  # slot, flags, guest address, size, address here
CPUID_HEAD = struct.Struct("=I4x")  # entries
CPUID_ENTRY = struct.Struct("=7I12x")  # function, index, flags, eax, ebx, ecx, edx
MSRS_HEAD = struct.Struct("=I4x")  # entries
MSR_ENTRY = struct.Struct("=I4xQ")  # index, value
COUNT = struct.Struct("=I")
IRQCHIP_HEAD = struct.Struct("=I4x")  # which
DEVICE_ATTR = struct.Struct("=IIQQ")  # flags, group, attribute, address of its value

REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)), "rip", "rflags")

CREATE_VM = ioc(0, _TYPE, 0x01, 0)
GET_MSR_INDEX_LIST = ioc(_READ | _WRITE, _TYPE, 0x02, COUNT.size)
CHECK_EXTENSION = ioc(0, _TYPE, 0x03, 0)
GET_VCPU_MMAP_SIZE = ioc(0, _TYPE, 0x04, 0)
GET_SUPPORTED_CPUID = ioc(_READ | _WRITE, _TYPE, 0x05, CPUID_HEAD.size)
CREATE_VCPU = ioc(0, _TYPE, 0x41, 0)
SET_USER_MEMORY_REGION = ioc(_WRITE, _TYPE, 0x46, MEMORY_REGION.size)
SET_TSS_ADDR = ioc(0, _TYPE, 0x47, 0)
CREATE_IRQCHIP = ioc(0, _TYPE, 0x60, 0)
GET_IRQCHIP = ioc(_READ | _WRITE, _TYPE, 0x62, IRQCHIP_BYTES)
SET_IRQCHIP = ioc(_READ, _TYPE, 0x63, IRQCHIP_BYTES)
SET_CLOCK = ioc(_WRITE, _TYPE, 0x7B, CLOCK_BYTES)
GET_CLOCK = ioc(_READ, _TYPE, 0x7C, CLOCK_BYTES)
GET_REGS = ioc(_READ, _TYPE, 0x81, REGS_BYTES)
SET_REGS = ioc(_WRITE, _TYPE, 0x82, REGS_BYTES)
GET_SREGS = ioc(_READ, _TYPE, 0x83, SREGS_BYTES)
SET_SREGS = ioc(_WRITE, _TYPE, 0x84, SREGS_BYTES)
GET_MSRS = ioc(_READ | _WRITE, _TYPE, 0x88, MSRS_HEAD.size)
SET_MSRS = ioc(_WRITE, _TYPE, 0x89, MSRS_HEAD.size)
GET_LAPIC = ioc(_READ, _TYPE, 0x8E, LAPIC_BYTES)
SET_LAPIC = ioc(_WRITE, _TYPE, 0x8F, LAPIC_BYTES)
SET_CPUID2 = ioc(_WRITE, _TYPE, 0x90, CPUID_HEAD.size)
GET_MP_STATE = ioc(_READ, _TYPE, 0x98, MP_STATE_BYTES)
SET_MP_STATE = ioc(_WRITE, _TYPE, 0x99, MP_STATE_BYTES)
GET_VCPU_EVENTS = ioc(_READ, _TYPE, 0x9F, EVENTS_BYTES)
SET_VCPU_EVENTS = ioc(_WRITE, _TYPE, 0xA0, EVENTS_BYTES)
GET_DEBUGREGS = ioc(_READ, _TYPE, 0xA1, DEBUGREGS_BYTES)
SET_DEBUGREGS = ioc(_WRITE, _TYPE, 0xA2, DEBUGREGS_BYTES)
SET_TSC_KHZ = ioc(0, _TYPE, 0xA2, 0)
GET_TSC_KHZ = ioc(0, _TYPE, 0xA3, 0)
GET_XSAVE = ioc(_READ, _TYPE, 0xA4, XSAVE_BYTES)
SET_XSAVE = ioc(_WRITE, _TYPE, 0xA5, XSAVE_BYTES)
GET_XCRS = ioc(_READ, _TYPE, 0xA6, XCRS_BYTES)
SET_XCRS = ioc(_WRITE, _TYPE, 0xA7, XCRS_BYTES)
GET_XSAVE2 = ioc(_READ, _TYPE, 0xCF, XSAVE_BYTES)

SET_DEVICE_ATTR = ioc(_WRITE, _TYPE, 0xE1, DEVICE_ATTR.size)
GET_DEVICE_ATTR = ioc(_WRITE, _TYPE, 0xE2, DEVICE_ATTR.size)

# Of KVM_CHECK_EXTENSION; what each is for is in machine.py.
CAP_IRQCHIP = 0
CAP_USER_MEMORY = 3
CAP_MP_STATE = 14
CAP_SET_GUEST_DEBUG = 23
CAP_ADJUST_CLOCK = 39
CAP_VCPU_EVENTS = 41
CAP_DEBUGREGS = 50
CAP_XSAVE = 55
CAP_XCRS = 56
CAP_GET_TSC_KHZ = 61
CAP_IMMEDIATE_EXIT = 136
CAP_XSAVE2 = 208

MP_STATE_RUNNABLE = 0
IRQCHIPS = 3  # two 8259, one I/O APIC

MSR_TSC = 0x10
VCPU_TSC_CTRL, VCPU_TSC_OFFSET = 0, 0  # group and attribute

EXIT_MMIO = 6
EXIT_NAMES = {
    2: "KVM_EXIT_IO",
    4: "KVM_EXIT_DEBUG",
    5: "KVM_EXIT_HLT",
    EXIT_MMIO: "KVM_EXIT_MMIO",
    8: "KVM_EXIT_SHUTDOWN",
    9: "KVM_EXIT_FAIL_ENTRY",
    17: "KVM_EXIT_INTERNAL_ERROR",
    39: "KVM_EXIT_MEMORY_FAULT",
}
