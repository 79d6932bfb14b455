"""A small guest that KVM runs: real vCPUs in long mode, whose program visits the memory as the emulated one does.

In: the mappings of all regions, a workload (or a machine made ready, and the saved state of a guest that ran
elsewhere). Out: device state, stall histograms by the guest's own clock, step counts, and a check of every byte: of the
content, and of the pages that the guest itself runs on. A vCPU may be stopped at any instruction, and in a page fault.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from postcopy.errors import HostError, PostcopyError, ProtocolError, UsageError
from postcopy.guest._guest import ffi, lib
from postcopy.guest.kvm import vcpu_state
from postcopy.guest.kvm.abi import EXIT_MMIO, EXIT_NAMES
from postcopy.guest.kvm.layout import MEMORY_AT, WINDOWS_AT, OwnPages
from postcopy.guest.kvm.machine import WINDOW_BYTES, Machine
from postcopy.guest.kvm.state import KIND, WORKLOADS, KvmState
from postcopy.guest.state import GUEST_PAGE_BYTES, GuestState, wanted_state
from postcopy.guest.vcpus import GuestMemory, WorkloadGuest, guest_pages
from postcopy.guest.verdict import CheckResult, check_memory, raise_for
from postcopy.limits import KVM_MEMORY_BYTES_MAX, KVM_SETTLE_SECONDS, KVM_VCPUS_MAX

_TICK_BITS = 32  # behind the point, in struct kvm_window
_NO_STALL_TICKS = (1 << 64) - 1


class GuestTroubleError(PostcopyError):
    """A vCPU cannot go on: the guest has done what its program never does, or KVM gave up on it."""


class KvmGuest(WorkloadGuest):
    """A guest of `vcpus` vCPUs of KVM on the given mappings, parked until `start()`.

    The options are those of the emulated Guest. Raises UsageError (among others for a workload that its program does
    not know), HostError (this host can have no such machine), KernelError.
    """

    kind = KIND
    vcpus_max = KVM_VCPUS_MAX

    def __init__(
        self,
        mappings: Sequence[GuestMemory],
        *,
        vcpus: int = 2,
        cpus: Sequence[int] = (),
        **options: Any,
    ) -> None:
        own, state = wanted_kvm(guest_pages(mappings), vcpus=vcpus, **options)
        machine = Machine(mappings, vcpus)
        try:
            self._begin(mappings, state, machine, cpus)
        except BaseException:
            machine.close()
            raise
        try:
            for vcpu in range(vcpus):
                vcpu_state.begin(machine, vcpu, self._registers(vcpu), own.level4_at)
        except BaseException:
            self.close()
            raise

    @classmethod
    def load(
        cls, mappings: Sequence[GuestMemory], machine: Machine, state: object, *, cpus: Sequence[int] = ()
    ) -> KvmGuest:
        """Make the guest that `save()` described in a machine made ready for it; memory is not touched.

        Raises ProtocolError if the state is not sound, or is of another processor or of a guest of another size. Then
        the machine stays the caller's.
        """
        pages = guest_pages(mappings) - own_pages(guest_pages(mappings), len(machine.vcpus)).count
        parsed = KvmState.parse(state, machine, pages)
        guest = cls.__new__(cls)
        guest._begin(mappings, parsed.program, machine, cpus)  # noqa: SLF001 - its own
        try:
            parsed.load(machine)
        except BaseException:
            WorkloadGuest.close(guest)
            raise
        return guest

    def _begin(self, mappings: Sequence[GuestMemory], state: GuestState, machine: Machine, cpus: Sequence[int]) -> None:
        self._machine = machine
        self._own = own_pages(guest_pages(mappings), len(state.vcpus))
        self._open(mappings, state, cpus, self._own.count)

    def _adopt(self) -> None:
        machine, khz = self._machine, self._machine.tsc_khz
        for vcpu, descriptor in enumerate(machine.vcpus):
            window = machine.window(vcpu)
            window.tick_ns = (1_000_000 << _TICK_BITS) // khz if khz else 0
            window.stall_min_ticks = lib.STALL_MIN_NS * khz // 1_000_000 if khz else _NO_STALL_TICKS
            raise_for("guest_adopt", lib.guest_adopt(self._guest, vcpu, descriptor, machine.run_bytes, window))

    def _registers(self, vcpu: int) -> dict[str, int]:
        """Return what the program finds in a vCPU's registers before its first step; see code.py."""
        return {
            "rip": self._own.code_at,
            "rflags": 2,  # no interrupts: KVM would let another thread wait for a page in this one's place
            "rbx": self._own.block_at(vcpu),
            "rsi": WINDOWS_AT + vcpu * WINDOW_BYTES,
            "r10": lib.guest_first_page(self._guest, vcpu),
        }

    def fill(self) -> None:
        """Write the program, its tables and blocks, the pattern and the zeros; only before the first step."""
        if any(self.steps()):
            raise RuntimeError("the guest has run: filling its memory would undo that")
        with self._in_use() as guest:
            for page, data in self._own_content([0] * self.vcpus):
                lib.guest_copy(self._address(page), data, len(data))
            raise_for("guest_fill", lib.guest_fill(guest))

    def save(self) -> dict[str, Any]:
        """Return the device state, made of what msgpack carries; the guest must be stopped (RuntimeError)."""
        with self._in_use() as guest:
            for vcpu in range(self.vcpus):
                raise_for("guest_read", lib.guest_read(guest, vcpu, ffi.new("uint64_t *"), ffi.new("uint64_t *")))
            return KvmState.save(self._machine, self._state, self._steps_max)

    def check(self, pages: bytes | None = None, *, threads: int = 1) -> CheckResult:
        """Compare every byte with what the seed and the step counts say it must be; the guest must be stopped.

        Each vCPU first finishes the step that it is in. Pages are numbered through all regions, the guest's own first.
        The rest is as with the emulated Guest. Raises GuestTroubleError where a vCPU cannot finish its step.
        """
        self._settle()
        pages = self._kept(pages)
        own, wanted = self._own.count, None if pages is None else int.from_bytes(pages, "little")
        total = self._state.guest_pages
        content = None if wanted is None else (wanted >> own).to_bytes(-(-total // 8), "little")
        threads = 1 if self._state.workload == "increment" else threads  # its own property is about pages in order
        steps = self.steps()
        with self._in_use() as guest:
            chosen = [one for one in self._own_content(steps) if wanted is None or wanted >> one[0] & 1]
            wrong = sorted(page for page, data in chosen if lib.guest_differs(self._address(page), data, len(data)))
            found = check_memory(guest, total, content, threads)
        first = wrong[0] if wrong else None if found.first_mismatch is None else own + found.first_mismatch
        return CheckResult(found.pages_checked + len(chosen), found.pages_mismatched + len(wrong), first)

    def _settle(self) -> None:
        """Let each vCPU go on to the end of the step that it is in: its program calls there if it is told to."""
        limit = self._steps_max
        self._limit(0)
        try:
            self.start()
            self.wait(KVM_SETTLE_SECONDS)
        finally:
            try:
                self.stop()
            finally:
                self._limit(limit)
        if self.trouble is not None:
            raise GuestTroubleError(f"guest: it cannot be checked: {self.trouble}")

    def _own_content(self, steps: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield each of the guest's own pages with what it holds when the vCPUs stand after so many steps."""
        yield from self._own.fixed()
        for vcpu, made in enumerate(steps):
            block = ffi.new("struct kvm_block *")
            raise_for("guest_block", lib.guest_block(self._guest, vcpu, made, self._own.content_at, block))
            yield self._own.block_page(vcpu), bytes(ffi.buffer(block)).ljust(GUEST_PAGE_BYTES, b"\0")

    def _address(self, page: int) -> Any:
        """Return where a page of the guest's memory is in this process."""
        for mapping in self._mappings:
            if page < mapping.region.size // GUEST_PAGE_BYTES:
                return ffi.cast("void *", mapping.address + page * GUEST_PAGE_BYTES)
            page -= mapping.region.size // GUEST_PAGE_BYTES
        raise IndexError(page)

    @property
    def trouble(self) -> str | None:
        """Why some vCPU cannot go on, whatever anybody does; live."""
        with self._in_reading() as guest:
            found = [(lib.guest_trouble(guest, vcpu), lib.guest_trouble_at(guest, vcpu)) for vcpu in range(self.vcpus)]
        troubles = [f"vCPU {vcpu}: {self._trouble(*one)}" for vcpu, one in enumerate(found) if one[0]]
        return ", ".join(troubles) or None

    def _trouble(self, code: int, at: int) -> str:
        """Say why a vCPU cannot go on. The program has no handler for a machine check: a lost page is its end."""
        if code == lib.KVM_TROUBLE_LOST:
            return f"it touched a page that is lost, at {at:#x} in this process"
        offset = at - MEMORY_AT
        for mapping in self._mappings:
            # Where KVM reads or writes for the guest, memory that it cannot have is to it no memory.
            if code == EXIT_MMIO and 0 <= offset < mapping.region.size:
                return f"it touched a page that is lost: region {mapping.region.index}, offset {offset:#x}"
            offset -= mapping.region.size
        if code & lib.KVM_TROUBLE_ERRNO:
            return f"KVM_RUN fails: {os.strerror(code & ~lib.KVM_TROUBLE_ERRNO)}"
        return EXIT_NAMES.get(code, f"exit reason {code}")

    def close(self, deadline: float = 10.0) -> None:
        """End the threads and the machine; the memory is the caller's; again: nothing."""
        super().close(deadline)
        self._machine.close()


class EmptyKvm:
    """A machine made ready for a guest that comes.

    Loading is rehearsed with the state that the machine has already: what can fail on this host fails before a guest
    stands still for it, and what takes longer the first time (a millisecond) does so now.
    """

    def __init__(self, mappings: Sequence[GuestMemory], vcpus: int, cpus: Sequence[int]) -> None:
        own = own_pages(guest_pages(mappings), vcpus)
        program = wanted_state(guest_pages(mappings), vcpus=vcpus, reserved=own.count)
        self._mappings = mappings
        self._cpus = cpus
        self._machine: Machine | None = Machine(mappings, vcpus)
        try:
            saved = KvmState.save(self._machine, program, None)
            WorkloadGuest.close(KvmGuest.load(mappings, self._machine, saved, cpus=cpus))
        except ProtocolError as refused:
            self.close()
            raise HostError(f"a guest of KVM: this host does not take back its own state: {refused}") from refused
        except BaseException:
            self.close()
            raise

    def load(self, state: object) -> KvmGuest:
        """Make the guest of its state."""
        assert self._machine is not None  # noqa: S101 - called once
        guest = KvmGuest.load(self._mappings, self._machine, state, cpus=self._cpus)
        self._machine = None
        return guest

    def close(self) -> None:
        """End the machine, unless it is a guest's by now."""
        if self._machine is not None:
            self._machine.close()
            self._machine = None


def wanted_kvm(pages: int, *, vcpus: int = 2, **options: Any) -> tuple[OwnPages, GuestState]:
    """Return the pages of its own and the state of a guest that has not begun; UsageError where that makes no sense."""
    own = own_pages(pages, vcpus)
    state = wanted_state(pages, vcpus=vcpus, reserved=own.count, **options)
    if state.workload not in WORKLOADS:
        known = ", ".join(WORKLOADS)
        raise UsageError(f"guest: workload {state.workload} is none of a guest of KVM: it knows {known}")
    return own, state


def own_pages(pages: int, vcpus: int) -> OwnPages:
    """Return which of these pages a guest has for itself; UsageError where it can have no such memory."""
    if pages * GUEST_PAGE_BYTES > KVM_MEMORY_BYTES_MAX:
        raise UsageError(f"guest: {pages * GUEST_PAGE_BYTES} bytes are more than a guest of KVM has addresses for")
    if not 1 <= vcpus <= KVM_VCPUS_MAX:
        raise UsageError(f"guest: {vcpus} vCPUs are not in 1 to {KVM_VCPUS_MAX}")
    return OwnPages(pages, vcpus, WINDOW_BYTES)
