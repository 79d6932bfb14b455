"""KVM's ABI against the header of the machine that builds, as its compiler understands it."""

import os
import shutil
import subprocess

import pytest

from postcopy.guest.kvm import abi

STRUCTS = {
    "kvm_regs": abi.REGS_BYTES,
    "kvm_sregs": abi.SREGS_BYTES,
    "kvm_xsave": abi.XSAVE_BYTES,
    "kvm_xcrs": abi.XCRS_BYTES,
    "kvm_vcpu_events": abi.EVENTS_BYTES,
    "kvm_mp_state": abi.MP_STATE_BYTES,
    "kvm_lapic_state": abi.LAPIC_BYTES,
    "kvm_debugregs": abi.DEBUGREGS_BYTES,
    "kvm_irqchip": abi.IRQCHIP_BYTES,
    "kvm_clock_data": abi.CLOCK_BYTES,
    "kvm_segment": abi.SEGMENT.size,
    "kvm_userspace_memory_region": abi.MEMORY_REGION.size,
    "kvm_cpuid_entry2": abi.CPUID_ENTRY.size,
    "kvm_msr_entry": abi.MSR_ENTRY.size,
    "kvm_device_attr": abi.DEVICE_ATTR.size,
}
FIELDS = {
    ("kvm_sregs", "cr0"): abi.CONTROL_OFFSET,
    ("kvm_sregs", "apic_base"): abi.CONTROL_OFFSET + 6 * 8,
    ("kvm_segment", "type"): 14,
    ("kvm_segment", "unusable"): 22,
    ("kvm_regs", "r8"): 8 * abi.REGISTERS.index("r8"),
    ("kvm_regs", "rip"): 8 * abi.REGISTERS.index("rip"),
    ("kvm_cpuid_entry2", "eax"): 12,
    ("kvm_msr_entry", "data"): 8,
    ("kvm_irqchip", "chip"): abi.IRQCHIP_HEAD.size,
    ("kvm_device_attr", "addr"): 16,
}
NUMBERS = {
    name: value
    for name, value in vars(abi).items()
    if isinstance(value, int) and (name.startswith(("GET_", "SET_", "CREATE_", "CHECK_", "CAP_", "MP_STATE_RUN")))
}


@pytest.fixture(scope="module")
def of_header(tmp_path_factory):
    """Return what the header says: sizes, offsets and numbers by the C expression for each."""
    folder = tmp_path_factory.mktemp("abi")
    asked = [f"sizeof(struct {name})" for name in STRUCTS]
    asked += [f"offsetof(struct {struct}, {field})" for struct, field in FIELDS]
    asked += [f"KVM_{name}" for name in NUMBERS] + ["KVM_VCPU_TSC_CTRL", "KVM_VCPU_TSC_OFFSET"]
    lines = "".join(f'    printf("%llu\\n", (unsigned long long)({one}));\n' for one in asked)
    source = f"#include <linux/kvm.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{\n{lines}}}\n"
    (folder / "ask.c").write_text(source)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    subprocess.run([compiler, str(folder / "ask.c"), "-o", str(folder / "ask")], check=True)
    said = subprocess.run([str(folder / "ask")], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(asked, map(int, said), strict=True))


def test_structures_are_as_large_as_the_header_says(of_header):
    assert {name: of_header[f"sizeof(struct {name})"] for name in STRUCTS} == STRUCTS


def test_fields_are_where_the_header_says(of_header):
    assert {key: of_header[f"offsetof(struct {key[0]}, {key[1]})"] for key in FIELDS} == FIELDS


def test_ioctls_and_capabilities_have_the_numbers_of_the_header(of_header):
    assert len(NUMBERS) > 40
    assert {name: of_header[f"KVM_{name}"] for name in NUMBERS} == NUMBERS
    assert of_header["KVM_VCPU_TSC_CTRL"] == abi.VCPU_TSC_CTRL
    assert of_header["KVM_VCPU_TSC_OFFSET"] == abi.VCPU_TSC_OFFSET
