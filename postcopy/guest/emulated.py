"""The emulated guest: vCPU threads in C that write to the regions' memory and clock their own accesses.

In: the mappings of all regions, a workload (or the saved state of a guest that ran elsewhere). Out: device state, stall
histograms, step counts, and a check of every byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from postcopy.errors import ProtocolError
from postcopy.guest._guest import ffi, lib
from postcopy.guest.state import KIND, STRIDE_PAGES, GuestState, Position, wanted_state
from postcopy.guest.vcpus import GuestMemory, WorkloadGuest, guest_pages, setup_of
from postcopy.guest.verdict import CheckResult, check_memory, raise_for
from postcopy.limits import GUEST_VCPUS_MAX


class Guest(WorkloadGuest):
    """A guest of `vcpus` threads on the given mappings, parked until `start()`.

    `nonce` (default: drawn from the system) is part of the pattern in memory and exists nowhere else, so that no one
    else can make up a page. `blank` is the fraction of pages that stay unvisited: half holes, half zeroed; with `holes`
    all of them are holes. `steps_max` and `steps_per_second` limit each vCPU. `cpus` pins vCPU v to
    cpus[v % len(cpus)]; it does not travel.

    Raises UsageError, HostError (no room for threads), KernelError.
    """

    kind = KIND
    vcpus_max = GUEST_VCPUS_MAX

    def __init__(
        self,
        mappings: Sequence[GuestMemory],
        *,
        workload: str = "random",
        vcpus: int = 2,
        seed: int = 0,
        nonce: int | None = None,
        blank: float = 0.125,
        holes: bool = False,
        stride: int = STRIDE_PAGES,
        random_start: bool = False,
        steps_max: int | None = None,
        steps_per_second: int = 0,
        cpus: Sequence[int] = (),
    ) -> None:
        state = wanted_state(
            guest_pages(mappings),
            workload=workload,
            vcpus=vcpus,
            seed=seed,
            nonce=nonce,
            blank=blank,
            holes=holes,
            stride=stride,
            random_start=random_start,
            steps_max=steps_max,
            steps_per_second=steps_per_second,
        )
        self._open(mappings, state, cpus)

    @classmethod
    def restore(cls, mappings: Sequence[GuestMemory], state: object, *, cpus: Sequence[int] = ()) -> Self:
        """Make the guest that `save()` described, its vCPUs parked before their next step; memory is not touched.

        Raises ProtocolError if the state is not sound or belongs to a guest of another size.
        """
        guest = cls.__new__(cls)
        guest._open(mappings, _parsed(state, mappings), cpus)  # noqa: SLF001 - its own
        return guest

    def become(self, state: object) -> None:
        """Be the guest that `save()` described, with the threads that are here; only before the first step.

        Nothing is made for it, so nothing can be lacking. Raises as restore() does, and for another number of vCPUs.
        """
        if self.accesses:
            raise RuntimeError("the guest has run: it can become no other")
        parsed = _parsed(state, self._mappings)
        if len(parsed.vcpus) != self.vcpus:
            raise ProtocolError(f"guest state: it is of {len(parsed.vcpus)} vCPUs, {self.vcpus} are ready here")
        with self._in_use() as guest:
            raise_for("guest_become", lib.guest_become(guest, setup_of(parsed)))
        self._state = parsed
        self._seek(parsed)

    def fill(self) -> None:
        """Write the pattern to all active pages, zeros behind the holes; only before the first step."""
        if any(self.steps()):
            raise RuntimeError("the guest has run: filling its memory would undo that")
        with self._in_use() as guest:
            raise_for("guest_fill", lib.guest_fill(guest))

    def save(self) -> dict[str, Any]:
        """Return the device state, made of what msgpack carries; the guest must be stopped (RuntimeError)."""
        positions = []
        with self._in_use() as guest:
            for v in range(self.vcpus):
                passes, position = ffi.new("uint64_t *"), ffi.new("uint64_t *")
                raise_for("guest_read", lib.guest_read(guest, v, passes, position))
                positions.append(Position(passes[0], position[0], lib.guest_steps(guest, v)))
        return self._state.at(tuple(positions), self._steps_max).to_map()

    def check(self, pages: bytes | None = None, *, threads: int = 1) -> CheckResult:
        """Compare every byte with what the seed and the step counts say it must be; the guest must be stopped.

        `pages` has bit p % 8 of byte p // 8 set for each guest page p (4096 bytes, numbered through all regions) to be
        checked; None: all. A page that is missing is touched, so somebody must serve its fault; a hole is not (its file
        is asked, and read where it has something). `threads` share the work, but for increment, whose own property (the
        bytes are equal but for one step of -1) is checked as well.
        """
        # Increment's own property is about pages in order.
        threads = 1 if self._state.workload == "increment" else threads
        with self._in_use() as guest:
            return check_memory(guest, self._state.guest_pages, self._kept(pages), threads)


def _parsed(state: object, mappings: Sequence[GuestMemory]) -> GuestState:
    """Return a state that is sound and of a guest of this memory; ProtocolError."""
    parsed = GuestState.from_map(state)
    pages = guest_pages(mappings)
    if parsed.guest_pages != pages:
        raise ProtocolError(f"guest state: it is of {parsed.guest_pages} guest pages, the memory here has {pages}")
    return parsed
