"""A guest of KVM on memory that is all there: let go, stopped anywhere, checked, moved, clocked."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from postcopy.errors import HostError, UsageError
from postcopy.guest import CheckResult
from postcopy.guest.kinds import kinds
from postcopy.guest.kvm import abi, layout, machine
from postcopy.guest.kvm.code import LABELS
from postcopy.guest.kvm.guest import EmptyKvm, GuestTroubleError, KvmGuest
from postcopy.guest.kvm.vcpu_state import registers_of
from tests.guest.memory import PAGE, Memory
from tests.guest.test_state import until
from tests.guest.test_vcpu import status

PAGES = 64
OWN = 4 + 1 + 2  # program, tables, a table for the first gibibyte, two blocks


@contextlib.contextmanager
def running(memory, **options):
    """A guest that runs on a memory."""
    with KvmGuest([memory], **{"seed": 3, "nonce": 4, "blank": 0.25, **options}) as guest:
        guest.fill()
        guest.start()
        yield guest


def descriptors():
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


def loaded(memory, state):
    return EmptyKvm([memory], len(state["vcpus"]), ()).load(state)


def rested(memory, workload="random", steps=100):
    """Return a guest whose vCPUs rest after so many steps."""
    guest = KvmGuest([memory], workload=workload, seed=3, nonce=4, blank=0.25, steps_max=steps)
    guest.fill()
    guest.start()
    guest.wait()
    guest.stop()
    return guest


@pytest.mark.parametrize("workload", ["sequential", "stride", "random", "increment"])
def test_stopped_at_any_instruction_it_goes_on_from_there(workload):
    """Every byte is right after each of many stops, and the registers say that they were not between two steps."""
    where = set()
    with Memory(PAGES) as memory, running(memory, workload=workload) as guest:
        last = [0, 0]
        for _ in range(25):
            until(lambda last=last: min(guest.steps()) > max(last))
            guest.stop()
            where |= {registers_of(vcpu)["rip"] - layout.MEMORY_AT for vcpu in guest.save()["vcpus"]}
            last = guest.steps()
            assert guest.check() == CheckResult(PAGES, 0, None)
            assert all(0 <= now - before <= 1 for before, now in zip(last, guest.steps(), strict=True))
            guest.start()
    assert len(where - set(LABELS.values())) > 5, "in the middle of a step, at different places"


def test_stopped_means_no_step():
    with Memory(PAGES) as memory, running(memory) as guest:
        for _ in range(50):
            guest.stop()
            steps, data = guest.steps(), memory.read()
            assert (guest.steps(), memory.read()) == (steps, data)
            guest.start()


@pytest.mark.parametrize("vcpus", [1, 2, 5])
def test_moved_again_and_again_it_counts_without_a_gap(vcpus):
    """From memory to memory, with nothing but the bytes and the state."""
    with contextlib.ExitStack() as stack:
        memories = [stack.enter_context(Memory(PAGES)) for _ in range(2)]
        guest = KvmGuest([memories[0]], vcpus=vcpus, seed=5)
        guest.fill()
        for turn in range(6):
            here, there = memories[turn % 2], memories[1 - turn % 2]
            before = guest.steps()
            guest.start()
            until(lambda guest=guest, before=before: min(guest.steps()) > max(before) + 50)
            guest.stop()
            state, steps = guest.save(), [vcpu["regs"] for vcpu in guest.save()["vcpus"]]
            guest.close()
            there.write(here.read())
            here.write(bytes(PAGES * PAGE))
            guest = loaded(there, state)
            assert [vcpu["regs"] for vcpu in guest.save()["vcpus"]] == steps
            assert guest.accesses == 0
            assert guest.check().pages_mismatched == 0
        guest.close()


def mark(state):
    """Give a state values that no vCPU has to begin with, in every part where the program leaves none."""
    for number, vcpu in enumerate(state["vcpus"], 1):
        vcpu["debugregs"] = struct.pack("=Q", 0x1000 * number) + vcpu["debugregs"][8:]
        xsave = bytearray(vcpu["xsave"])
        xsave[160:176] = bytes([number]) * 16  # xmm0
        xsave[512] |= 3  # which is in use, and so is the x87 part
        vcpu["xsave"] = bytes(xsave)
        vcpu["xcrs"] = vcpu["xcrs"][:16] + struct.pack("=Q", 3) + vcpu["xcrs"][24:]  # x87 and xmm
        lapic = bytearray(vcpu["lapic"])
        lapic[0x80] = lapic[0xA0] = 0x10 * number  # the priorities of task and processor
        lapic[0xF0] = 0x50 + number  # the vector of what is spurious
        vcpu["lapic"] = bytes(lapic)
        vcpu["events"] = vcpu["events"][:14] + b"\1" + vcpu["events"][15:]  # no NMI now
        vcpu["sregs"] = with_cr8(vcpu["sregs"], number)
        msrs = dict(vcpu["msrs"]) | {0xC0000082: 0x7000 + number, 0xC0000102: 0x8000 + number}
        vcpu["msrs"] = [list(one) for one in msrs.items()]
    state["clock"] += 10**12
    state["time_stamps"] = [stamp + 10**13 for stamp in state["time_stamps"]]


def with_cr8(sregs, value):
    control = list(abi.CONTROL.unpack_from(sregs, abi.CONTROL_OFFSET))
    control[4] = value
    return sregs[: abi.CONTROL_OFFSET] + abi.CONTROL.pack(*control) + sregs[abi.CONTROL_OFFSET + abi.CONTROL.size :]


def test_the_whole_state_arrives():
    """Saved, loaded and saved again it is the same but for what runs on: the clock and what counts with it."""
    with Memory(PAGES) as memory, running(memory) as guest:
        until(lambda: min(guest.steps()) > 100)
        guest.stop()
        state = guest.save()
        mark(state)
        with loaded(memory, state) as other:
            again, own_time = other.save(), other._machine.own_time
    ahead = [new - old for old, new in zip(state["time_stamps"], again["time_stamps"], strict=True)]
    assert ahead[0] == ahead[1], "of one moment"
    assert ahead[0] > 0 or not own_time
    assert again["clock"] >= state["clock"]
    for name in ("kind", "version", "program", "cpuid", "tsc_khz", "irqchips"):
        assert again[name] == state[name], name
    for old, new in zip(state["vcpus"], again["vcpus"], strict=True):
        for name in old:
            assert new[name] == old[name], name


def test_one_bit_in_any_page_is_found():
    """Of the program, the tables and the blocks, of the content, the holes and the zeros."""
    with Memory(PAGES) as memory, rested(memory) as guest:
        for page in range(PAGES):
            memory.flip(page * PAGE + 4095, 6)
            assert guest.check() == CheckResult(PAGES, 1, page)
            memory.flip(page * PAGE + 4095, 6)
        assert guest.check().pages_mismatched == 0


@pytest.mark.parametrize("workload", ["sequential", "random", "increment"])
def test_a_page_that_is_old_by_one_step_is_found(workload):
    with Memory(PAGES) as memory, rested(memory, workload, 100) as guest:
        before = memory.read()
        guest.limit(101)
        guest.start()
        guest.wait()
        guest.stop()
        after = memory.read()
        changed = [n for n in range(PAGES) if before[n * PAGE :][:PAGE] != after[n * PAGE :][:PAGE]]
        assert {OWN - 2, OWN - 1} < set(changed), "both blocks and at least one page of the content"
        for page in changed:
            memory.write(after[: page * PAGE] + before[page * PAGE :][:PAGE] + after[(page + 1) * PAGE :])
            assert guest.check() == CheckResult(PAGES, 1, page)
            memory.write(after)
        assert guest.check().pages_mismatched == 0


def test_zeros_in_place_of_any_page_are_found():
    with Memory(PAGES) as memory, rested(memory) as guest:
        data = memory.read()
        written = [n for n in range(PAGES) if any(data[n * PAGE :][:PAGE])]
        assert written == list(range(PAGES - 16))
        for page in written:
            memory.write(data[: page * PAGE] + bytes(PAGE) + data[(page + 1) * PAGE :])
            assert guest.check() == CheckResult(PAGES, 1, page)


def test_only_the_pages_asked_for_are_checked():
    with Memory(PAGES) as memory, rested(memory) as guest:
        for page in (2, 20, 60):
            memory.flip(page * PAGE + 99, 0)
        assert guest.check((1 << 2 | 1 << 3).to_bytes(8, "little")) == CheckResult(2, 1, 2)
        assert guest.check((1 << 20 | 1 << 60).to_bytes(8, "little"), threads=3) == CheckResult(2, 2, 20)
        assert guest.check((1 << 4).to_bytes(8, "little")) == CheckResult(1, 0, None)


@pytest.mark.parametrize("kind", ["shmem", "anonymous"])
def test_memory_of_several_regions(kind):
    """The guest's own pages lie in more than one of them, and the holes are asked for where they are in their files."""
    sizes = [3, 2, 40, 1, 30]
    with contextlib.ExitStack() as stack:
        memories = [stack.enter_context(Memory(pages, kind=kind)) for pages in sizes]
        with KvmGuest(memories, vcpus=3, blank=0.5, holes=True, seed=1) as guest:
            guest.fill()
            guest.start()
            until(lambda: min(guest.steps()) > 500)
            guest.stop()
            assert guest.check() == CheckResult(sum(sizes), 0, None)
            if kind == "shmem":
                assert [one.allocated() for one in memories] == [3, 2, 33, 0, 0], "a check makes no page of a hole"
            memories[4].flip(29 * PAGE, 0)
            memories[1].flip(PAGE, 0)
            assert guest.check() == CheckResult(sum(sizes), 2, 4)


def test_a_limit_is_kept_raised_and_lifted():
    with Memory(PAGES) as memory, rested(memory, steps=10) as guest:
        assert guest.steps() == [10, 10]
        guest.limit(25)
        guest.start()
        guest.wait()
        assert guest.steps() == [25, 25]
        guest.stop()
        assert guest.save()["program"]["steps_max"] == 25
        with loaded(memory, guest.save()) as other:
            other.start()
            other.wait()
            assert other.steps() == [25, 25]
            assert other.check().pages_mismatched == 0
        guest.limit(None)
        guest.start()
        until(lambda: min(guest.steps()) > 200)


def test_pace_is_kept_and_waiting_for_it_is_no_stall():
    with Memory(PAGES) as memory, KvmGuest([memory], steps_per_second=50, steps_max=11, vcpus=1) as guest:
        guest.fill()
        began = time.monotonic()
        guest.start()
        guest.wait()
        assert time.monotonic() - began >= 0.199
        assert guest.stall.sum_ns < 150_000_000
        assert guest.check().pages_mismatched == 0


def test_the_guest_clocks_its_own_steps_and_no_pause_of_the_host():
    with Memory(PAGES) as memory, running(memory, vcpus=1) as guest:
        until(lambda: guest.steps()[0] > 2000)
        guest.stop()
        paused = time.monotonic()
        stall = guest.stall
        assert 0 < stall.count <= guest.steps()[0]
        ran = guest.last_step_at - guest.first_step_at
        assert 0 < stall.sum_ns / 1e9 < ran * 1.05
        until(lambda: time.monotonic() - paused > 1.0)
        guest.start()
        until(lambda: guest.steps()[0] > 4000)
        guest.stop()
        assert guest.stall.max_ns < 1_000_000_000


def test_times_of_the_first_instruction_and_the_last_exit():
    with Memory(PAGES) as memory, KvmGuest([memory], vcpus=2) as guest:
        guest.fill()
        assert (guest.first_step_at, guest.last_step_at) == (None, None)
        before = time.monotonic()
        guest.start()
        until(lambda: min(guest.steps()) > 0)
        asked = time.monotonic()
        guest.stop()
        assert before < guest.first_step_at < asked < guest.last_step_at < time.monotonic()
        again = guest.last_step_at
        guest.start()
        until(lambda: guest.first_step_at is not None)
        assert guest.first_step_at > again


def test_threads_hear_of_no_signal_but_the_kick_and_run_where_they_are_told():
    cpus = sorted(os.sched_getaffinity(0))[:1]
    with Memory(PAGES) as memory, KvmGuest([memory], vcpus=3, cpus=cpus) as guest:
        for tid in guest.tids:
            assert int(status(tid, "SigBlk"), 16) == (1 << 64) - 1 - (1 << 8) - (1 << 18) - (3 << 31)
            assert status(tid, "Cpus_allowed_list") == str(cpus[0])


def test_a_running_guest_refuses_what_needs_it_stopped():
    with Memory(PAGES) as memory, running(memory) as guest:
        for refused in (guest.save, lambda: guest.limit(5), guest.check):
            with pytest.raises(RuntimeError, match="stop it first"):
                refused()
        until(lambda: min(guest.steps()) > 0)
        guest.stop()
        with pytest.raises(RuntimeError, match="undo"):
            guest.fill()


def test_a_closed_guest_says_so_and_leaves_no_descriptor():
    with Memory(PAGES) as memory:
        before = descriptors()
        guest = rested(memory)
        assert len(descriptors()) > len(before)
        guest.close()
        guest.close()
        assert descriptors() == before
        with pytest.raises(RuntimeError, match="closed"):
            guest.steps()


def test_an_interpreter_that_forgets_to_close_ends_well():
    code = (
        "from tests.guest.memory import Memory; from postcopy.guest.kvm.guest import KvmGuest; "
        "g = KvmGuest([Memory(64)]); g.fill(); g.start()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


@pytest.mark.parametrize("code", [b"\x0f\x0b", b"\xf4", b"\xe6\x99"], ids=["ud2", "hlt", "out to nobody"])
def test_a_program_gone_wrong_is_told_of_and_can_be_ended(code):
    with Memory(PAGES) as memory, KvmGuest([memory], vcpus=2) as guest:
        guest.fill()
        memory.write(code + memory.read()[len(code) :])
        assert guest.trouble is None
        guest.start()
        if code == b"\xf4":  # halted for ever: KVM keeps it, and it can be stopped
            until(lambda: guest.first_step_at is not None)
            guest.stop()
            assert guest.steps() == [0, 0]
            return
        until(lambda: guest.trouble is not None)
        assert re.match(r"vCPU [01]: KVM_EXIT_\w+", guest.trouble)  # whichever came to it first
        guest.stop()
        with pytest.raises(GuestTroubleError, match=r"it cannot be checked: vCPU [01]: KVM_EXIT_"):
            guest.check()


@pytest.mark.parametrize(
    ("pages", "options", "text"),
    [
        (PAGES, {"workload": "zipf"}, "workload zipf is none of a guest of KVM: it knows sequential, stride, random"),
        (PAGES, {"workload": "sleep"}, "unknown workload"),
        (PAGES, {"vcpus": 0}, "0 vCPUs are not in 1 to 128"),
        (PAGES, {"vcpus": 129}, "129 vCPUs are not in 1 to 128"),
        (OWN, {}, "7 pages of memory are too few: 7 are its own, 0 blank"),
        (OWN + 9, {"blank": 0.75}, "16 pages of memory are too few: 7 are its own, 12 blank"),
    ],
)
def test_what_makes_no_sense_is_refused(pages, options, text):
    with Memory(pages) as memory, pytest.raises(UsageError, match=text):
        KvmGuest([memory], **options)


def test_the_smallest_and_the_widest():
    with Memory(OWN + 1) as memory, running(memory, blank=0) as guest:
        until(lambda: min(guest.steps()) > 20)
        guest.stop()
        assert guest.check() == CheckResult(OWN + 1, 0, None)
    with Memory(256) as memory, running(memory, vcpus=24, steps_max=30) as guest:
        guest.wait(60)
        guest.stop()
        assert guest.check() == CheckResult(256, 0, None)


def test_every_processor_of_this_host_is_the_same_to_a_guest():
    """Asked on one after the other: what tells them apart is left out, or no guest could come to its own host."""
    allowed = os.sched_getaffinity(0)
    with Memory(PAGES) as memory:
        seen = []
        try:
            for cpu in sorted(allowed):
                os.sched_setaffinity(0, {cpu})
                one = machine.Machine([memory], 1)
                seen.append((one.cpuid, one.tsc_khz, set(one.msrs), one.fixed_msrs))
                one.close()
        finally:
            os.sched_setaffinity(0, allowed)
    assert all(one == seen[0] for one in seen)
    assert not any(entry[0] in range(0x40000000, 0x50000000) for entry in seen[0][0]), "no hypervisor"


def test_a_host_without_kvm_says_why(monkeypatch):
    from postcopy.kernel import kvm

    monkeypatch.setattr(kvm, "DEVICE", kvm.DEVICE.with_name("kvm-that-is-not-there"))
    with pytest.raises(HostError, match=r"no virtual machine can be made: open .*: No such file or directory"):
        kinds()["kvm"].check_host()
    monkeypatch.undo()
    monkeypatch.setitem(machine._NEEDED, "KVM_CAP_OF_TOMORROW", 99999)
    with pytest.raises(HostError, match="this kernel's KVM lacks KVM_CAP_OF_TOMORROW"):
        kinds()["kvm"].check_host()
    monkeypatch.setattr(machine.platform, "machine", lambda: "riscv64")
    with pytest.raises(HostError, match="this host is riscv64"):
        kinds()["kvm"].check_host()
