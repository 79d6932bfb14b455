"""A guest that runs a workload on vCPU threads in C: let go, stopped between two steps, watched, checked, ended.

What is the same for every kind of vCPU is here. A subclass makes the threads, says what travels and what memory must
hold. The threads never hold the GIL, and every call here that waits for them releases it, so a fault can always be
served by this same process.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, Protocol, Self

from postcopy.errors import HostError, PostcopyError, UsageError
from postcopy.guest._guest import ffi, lib
from postcopy.guest.state import GUEST_PAGE_BYTES, WORKLOADS, GuestState
from postcopy.guest.verdict import CheckResult, raise_for
from postcopy.limits import AT_EXIT_SECONDS, STEPS_MAX
from postcopy.pages import Region
from postcopy.pump.histogram import Histogram

_NONE = (1 << 64) - 1  # C's "no limit" and "no page"


class GuestMemory(Protocol):
    """One region's memory in this process, as `postcopy.kernel` maps it; the guest borrows it until it is closed."""

    @property
    def region(self) -> Region:
        """The region mapped here; its size is a multiple of 4096 bytes."""

    @property
    def address(self) -> int:
        """Where the guest's mapping begins."""

    @property
    def fd(self) -> int:
        """The memory's descriptor, mapped from its offset 0 on; -1 where there is none."""


class GuestStuckError(PostcopyError):
    """A vCPU thread did not come out of its access before the deadline: it waits in a page fault nobody serves."""


class WorkloadGuest(ABC):
    """A guest of some threads on mappings of memory, parked until `start()`.

    A guest is used by one thread at a time, but for the readings (steps, accesses, stall, first_step_at, last_step_at)
    and close(), which waits for what another thread is doing with it. Close it before the mappings are; of what is read
    its stall alone is told after that, too.
    """

    kind: str
    vcpus_max: int

    def _open(
        self, mappings: Sequence[GuestMemory], state: GuestState, cpus: Sequence[int], own_pages: int = 0
    ) -> None:
        """Make the threads of a guest in this state, parked, on the given memory, of which its own pages come first."""
        self._mappings = tuple(mappings)  # borrowed memory is kept alive
        self._own_pages = own_pages
        self._lost = 0  # a bit for each page
        self._lost_bits: list[Any] = []
        self._state = state
        pinned = [cpus[v % len(cpus)] for v in range(len(state.vcpus))] if cpus else None
        out, segments = ffi.new("struct guest **"), _segments(mappings, own_pages)
        number = lib.guest_create(setup_of(state), segments, len(segments), ffi.NULL if pinned is None else pinned, out)
        if number == errno.EINVAL and pinned is not None:
            raise UsageError(f"guest: vCPUs cannot run on CPUs {', '.join(map(str, cpus))}")
        if number in {errno.ENOMEM, errno.EAGAIN}:
            raise HostError(f"guest: no room for {len(state.vcpus)} vCPU threads ({os.strerror(number)})")
        raise_for("guest_create", number)
        self._guest = out[0]
        self._using = threading.Lock()  # held by whoever does more than a reading
        self._reading = threading.Lock()  # held for the microseconds of a reading
        self._closed = False
        self._stall_at_end: list[Histogram] = []
        # A program that ends without close() must not tear memory away under running threads.
        self._finalizer = weakref.finalize(self, _end, self._guest)
        try:
            self._adopt()
            self._seek(state)
        except BaseException:
            WorkloadGuest.close(self)
            raise

    def _seek(self, state: GuestState) -> None:
        """Put the parked vCPUs where the state says that they are."""
        for v, vcpu in enumerate(state.vcpus):
            raise_for("guest_seek", lib.guest_seek(self._guest, v, vcpu.passes, vcpu.position))
        self._limit(state.steps_max)

    def _adopt(self) -> None:  # noqa: B027 - not every kind has something to do
        """Give the vCPUs, whose threads are there and parked, what they are run by: nothing, if by those threads."""

    @property
    def trouble(self) -> str | None:
        """Why some vCPU cannot go on, whatever anybody does; live."""
        return None

    @property
    def vcpus(self) -> int:
        """Number of vCPUs."""
        return len(self._state.vcpus)

    @property
    def workload(self) -> str:
        """How the vCPUs go over memory."""
        return self._state.workload

    @abstractmethod
    def fill(self) -> None:
        """Write what the vCPUs find in memory before their first step."""

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """Return the device state, made of what msgpack carries; the guest must be stopped (RuntimeError)."""

    @abstractmethod
    def check(self, pages: bytes | None = None, *, threads: int = 1) -> CheckResult:
        """Compare every byte with what it must be; the guest must be stopped."""

    def start(self) -> None:
        """Let the vCPUs go on; costs microseconds."""
        with self._in_use() as guest:
            raise_for("guest_start", lib.guest_start(guest))

    def stop(self, deadline: float = 10.0) -> None:
        """Return when every vCPU is parked, between two steps or, where a real processor makes them, anywhere in one.

        Raises GuestStuckError after `deadline` seconds; the vCPUs named in it will park when their access ends, unless
        `start()` is called again.
        """
        with self._in_use() as guest:
            number = lib.guest_stop(guest, deadline_ns(deadline))
            _raise_if_late(number, self._moving(), "did not stop", deadline)

    def limit(self, steps_max: int | None) -> None:
        """Set the number of steps, counted from the first ever, at which each vCPU parks; only while stopped."""
        if steps_max is not None and not 0 <= steps_max <= STEPS_MAX:
            raise UsageError(f"guest: steps_max {steps_max} is not in 0 to {STEPS_MAX}")
        self._limit(steps_max)

    def wait(self, deadline: float = 10.0) -> None:
        """Return when every vCPU has parked at its limit; GuestStuckError after `deadline` seconds."""
        with self._in_use() as guest:
            number = lib.guest_wait(guest, deadline_ns(deadline))
        limit = _NONE if self._steps_max is None else self._steps_max
        below = [v for v, steps in enumerate(self.steps()) if steps < limit]
        _raise_if_late(number, below, "did not reach its limit", deadline)

    def steps(self) -> list[int]:
        """Return how many steps each vCPU has made, here and before; live."""
        with self._in_reading() as guest:
            return [lib.guest_steps(guest, v) for v in range(self.vcpus)]

    @property
    def accesses(self) -> int:
        """Steps made by this guest in this process, all of them clocked; live."""
        with self._in_reading() as guest:
            return sum(lib.guest_accesses(guest, v) for v in range(self.vcpus))

    def lose(self, extents: Sequence[tuple[int, int, int]]) -> None:
        """Bear it that these bytes (region, offset, length; whole pages) may be poisoned from now on; live.

        A vCPU that touches one makes a step less, or stops: `lost_steps`, `trouble`. check() leaves them out.
        """
        pages = self._state.guest_pages
        lost = bytearray(-(-(self._own_pages + pages) // 8))
        for region, offset, length in extents:
            before = sum(mapping.region.size for mapping in self._mappings[:region])
            _mark(lost, (before + offset) // GUEST_PAGE_BYTES, (before + offset + length) // GUEST_PAGE_BYTES)
        with self._in_use() as guest:
            self._lost = int.from_bytes(lost, "little")
            bits = (self._lost >> self._own_pages).to_bytes(-(-pages // 8), "little")
            self._lost_bits.append(ffi.from_buffer(bits))  # C looks at them for as long as the guest is there
            lib.guest_lose(guest, self._lost_bits[-1])

    def _kept(self, pages: bytes | None) -> bytes | None:
        """Return which of the pages that are to be checked are not lost; None: all."""
        if not self._lost:
            return pages
        total = self._state.guest_pages + self._own_pages
        wanted = (1 << total) - 1 if pages is None else int.from_bytes(pages, "little")
        return (wanted & ~self._lost).to_bytes(-(-total // 8), "little")

    @property
    def lost_steps(self) -> int:
        """Steps made here that met a page that is lost (a machine check) and left it at that; live."""
        with self._in_reading() as guest:
            return sum(lib.guest_lost(guest, v) for v in range(self.vcpus))

    @property
    def stall_per_vcpu(self) -> list[Histogram]:
        """Accesses of each vCPU that took STALL_MIN_NS or longer; live, and as they were when it was closed."""
        with self._reading:
            if self._closed:
                return self._stall_at_end
            return [_stall(self._guest, v) for v in range(self.vcpus)]

    @property
    def stall(self) -> Histogram:
        """Accesses of all vCPUs that took 1 microsecond or longer: less is the memory's own business; live."""
        return reduce(Histogram.merge, self.stall_per_vcpu)

    @property
    def first_step_at(self) -> float | None:
        """End of the first step that any vCPU completed since the last start, in seconds of CLOCK_MONOTONIC."""
        with self._in_reading() as guest:
            times = [lib.guest_first_step_at(guest, v) for v in range(self.vcpus)]
        return min((at / 1e9 for at in times if at), default=None)

    @property
    def last_step_at(self) -> float | None:
        """End of the latest step of any vCPU in this process, in seconds of CLOCK_MONOTONIC."""
        with self._in_reading() as guest:
            times = [lib.guest_last_step_at(guest, v) for v in range(self.vcpus)]
        return max((at / 1e9 for at in times if at), default=None)

    @property
    def tids(self) -> list[int]:
        """Thread ids of the vCPUs."""
        with self._in_reading() as guest:
            return [lib.guest_tid(guest, v) for v in range(self.vcpus)]

    def close(self, deadline: float = 10.0) -> None:
        """End the threads and free everything but the memory, which is the caller's; again: nothing.

        Waits for what another thread is doing with the guest; from then on readings are refused. Raises GuestStuckError
        after `deadline` seconds: nothing is freed then, the memory must stay mapped, and the call may be repeated when
        the fault has been served.
        """
        if not self._using.acquire(timeout=deadline):
            raise GuestStuckError(f"guest: another thread was not done with it within {deadline:g} s")
        try:
            if not self._finalizer.alive:
                return
            with self._reading:
                self._stall_at_end = [_stall(self._guest, v) for v in range(self.vcpus)]
                self._closed = True
            number = lib.guest_destroy(self._guest, deadline_ns(deadline))
            if number != errno.ETIMEDOUT:
                self._finalizer.detach()
                return
            self._closed = False
            _raise_if_late(number, self._moving(), "did not end", deadline)
        finally:
            self._using.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _in_use(self) -> Iterator[Any]:
        """Give the guest in C to one thread, and keep close() out; RuntimeError once it is closed."""
        with self._using:
            yield self._handle

    @contextmanager
    def _in_reading(self) -> Iterator[Any]:
        """Give the guest in C for a reading, and keep close() out for so long; RuntimeError once it is closed."""
        with self._reading:
            yield self._handle

    @property
    def _handle(self) -> Any:
        if self._closed:
            raise RuntimeError("the guest is closed")
        return self._guest

    def _limit(self, steps_max: int | None) -> None:
        with self._in_use() as guest:
            raise_for("guest_limit", lib.guest_limit(guest, _NONE if steps_max is None else steps_max))
        self._steps_max = steps_max

    def _moving(self) -> list[int]:
        with self._in_reading() as guest:
            return [v for v in range(self.vcpus) if not lib.guest_parked(guest, v)]


def guest_pages(mappings: Sequence[GuestMemory]) -> int:
    """Return how many guest pages all the memory is; UsageError where that makes no sense."""
    return pages_of([mapping.region.size for mapping in mappings])


def pages_of(sizes: Sequence[int]) -> int:
    """Return the same of regions of these sizes in bytes."""
    if not sizes:
        raise UsageError("guest: it has no memory")
    for size in sizes:
        if size % GUEST_PAGE_BYTES:
            raise UsageError(f"guest: region size {size} is not a multiple of {GUEST_PAGE_BYTES}")
    return sum(sizes) // GUEST_PAGE_BYTES


def _mark(bits: bytearray, first: int, stop: int) -> None:
    """Set bits first..stop-1: whole bytes at once, for there may be millions."""
    begin, end = -(-first // 8), stop // 8
    if begin < end:
        bits[begin:end] = b"\xff" * (end - begin)
    for bit in range(first, stop) if begin >= end else (*range(first, begin * 8), *range(end * 8, stop)):
        bits[bit // 8] |= 1 << bit % 8


def setup_of(state: GuestState) -> Any:
    """Return what C needs to know of a state beside where its vCPUs stand."""
    setup = {
        "workload": WORKLOADS[state.workload],
        "vcpus": len(state.vcpus),
        "seed": state.seed,
        "nonce": state.nonce,
        "blank_pages": state.blank_pages,
        "hole_pages": state.hole_pages,
        "stride": state.stride,
        "random_start": state.random_start,
        "steps_per_second": state.steps_per_second,
    }
    return ffi.new("struct guest_setup *", setup)


def _segments(mappings: Sequence[GuestMemory], own_pages: int) -> Any:
    parts = []
    for mapping in mappings:
        pages = mapping.region.size // GUEST_PAGE_BYTES
        skipped = min(own_pages, pages)
        own_pages -= skipped
        offset = skipped * GUEST_PAGE_BYTES
        if skipped < pages:
            parts.append((ffi.cast("void *", mapping.address + offset), pages - skipped, mapping.fd, offset))
    return ffi.new("struct guest_segment[]", parts)


def _raise_if_late(number: int, late: list[int], what: str, deadline: float) -> None:
    if number == errno.ETIMEDOUT:
        raise GuestStuckError(f"guest: vCPU {', '.join(map(str, late))} {what} within {deadline:g} s")
    raise_for("waiting for vCPUs", number)


def _stall(guest: Any, vcpu: int) -> Histogram:
    words = memoryview(ffi.buffer(lib.guest_stall(guest, vcpu), lib.GUEST_STALL_BYTES)).cast("Q")
    return Histogram.from_words(words)


def _end(guest: Any) -> None:
    # If a vCPU is stuck nothing was freed, and the process that ends takes it along.
    lib.guest_destroy(guest, deadline_ns(AT_EXIT_SECONDS))


def deadline_ns(seconds: float) -> int:
    """Return the moment in so many seconds, as C takes it."""
    return time.monotonic_ns() + int(seconds * 1e9)
