"""A vCPU of KVM on memory that is not there yet: what it waits for, and that nobody waits for it."""

from __future__ import annotations

import ctypes
import threading
import time

from tests.child import run_in_child
from tests.guest.memory import PAGE, Faults, Memory
from tests.guest.test_state import until

PAGES = 64


def left(vcpus=1):
    """Return the memory and the state of a guest that was stopped somewhere else."""
    from postcopy.guest.kvm.guest import KvmGuest

    memory = Memory(PAGES)
    with KvmGuest([memory], vcpus=vcpus, seed=2) as guest:
        guest.fill()
        guest.start()
        until(lambda: min(guest.steps()) > 100)
        guest.stop()
        return memory.read(), guest.save()


class Served:
    """Memory whose pages come when they are asked for, and not before; `asked` are those that were, in order."""

    def __init__(self, data):
        self.memory = Memory(PAGES)
        self.faults = Faults(self.memory)
        self.asked = []
        self._data = data
        self._buffer = ctypes.create_string_buffer(2 * PAGE)
        self._source = ctypes.addressof(self._buffer) + -ctypes.addressof(self._buffer) % PAGE

    def await_one(self):
        """Return the page that is asked for next; one that was served meanwhile is not asked for."""
        while True:
            page = (self.faults.next() - self.memory.address) // PAGE
            if page not in self.asked:
                self.asked.append(page)
                return page

    def serve(self, page):
        ctypes.memmove(self._source, self._data[page * PAGE :][:PAGE], PAGE)
        self.faults.uffd.copy(self.memory.address + page * PAGE, self._source, PAGE)

    def serve_all(self):
        """Go on serving, until the process ends."""

        def forever():
            while True:
                self.serve(self.await_one())

        threading.Thread(target=forever, daemon=True).start()


def first_instruction():
    from postcopy.guest.kvm import layout
    from postcopy.guest.kvm.guest import EmptyKvm

    data, state = left()
    served = Served(data)
    empty = EmptyKvm([served.memory], 1, ())
    guest = empty.load(state)
    assert not served.faults.uffd.poll(0), "neither making the machine nor loading it touches memory"
    guest.start()
    for page in (layout._LEVEL4, layout._LEVEL3, layout._LEVEL2, layout._CODE):
        assert served.await_one() == page
        assert guest.first_step_at is None
        served.serve(page)
    served.serve_all()
    until(lambda: guest.first_step_at is not None)
    until(lambda: guest.steps()[0] > state["program"]["vcpus"][0][2] + 200)
    guest.stop()
    result = guest.check()
    return result.pages_checked, result.pages_mismatched, len(set(served.asked))


def test_the_first_instruction_needs_the_tables_and_the_program_and_is_timed_when_they_are_there():
    assert run_in_child(first_instruction) == (PAGES, 0, PAGES - 4)  # a check reads no hole


def nobody_waits():
    """A vCPU waits in a fault; all else goes on at once, and a stop that cannot be had can be given up."""
    from postcopy.guest import GuestStuckError
    from postcopy.guest.kvm.guest import EmptyKvm

    data, state = left(2)
    served = Served(data)
    guest = EmptyKvm([served.memory], 2, ()).load(state)
    guest.start()
    page = served.await_one()
    began = time.monotonic()
    before = guest.steps()
    assert guest.stall.count == guest.accesses == 0
    assert guest.trouble is None
    stuck = False
    try:
        guest.stop(0.05)
    except GuestStuckError:
        stuck = True  # where KVM itself reads memory for the guest, nothing ends that but the page
    assert guest.steps() == before
    waited = time.monotonic() - began
    guest.start()
    served.serve(page)
    served.serve_all()
    until(lambda: min(guest.steps()) > max(before) + 100)
    guest.stop()
    state = guest.save()
    assert guest.check().pages_mismatched == 0
    guest.close()
    return waited, stuck


def test_a_vcpu_in_a_fault_keeps_nobody_waiting():
    waited, _ = run_in_child(nobody_waits)
    assert waited < 5


def close_in_a_fault():
    from postcopy.guest import GuestStuckError
    from postcopy.guest.kvm.guest import EmptyKvm

    data, state = left(2)
    served = Served(data)
    guest = EmptyKvm([served.memory], 2, ()).load(state)
    guest.start()
    page = served.await_one()
    try:
        guest.close(0.05)
    except GuestStuckError:
        guest.steps()  # nothing was freed
        served.serve(page)
        served.serve_all()
        guest.close()
    return True


def test_a_guest_in_a_fault_can_be_closed_once_it_is_served():
    assert run_in_child(close_in_a_fault)


def stop_between():
    """Stopped over and over while its pages come, at whatever it waits for: nothing is lost, nothing done twice."""
    from postcopy.guest.kvm.guest import EmptyKvm

    data, state = left(3)
    served = Served(data)
    guest = EmptyKvm([served.memory], 3, ()).load(state)
    served.serve_all()
    last = [vcpu[2] for vcpu in state["program"]["vcpus"]]
    for _ in range(30):
        guest.start()
        time.sleep(0.001)  # anywhere: no order is wanted
        guest.stop()
        steps = guest.steps()
        assert all(now >= before for before, now in zip(last, steps, strict=True))
        last = steps
    guest.start()
    until(lambda: min(guest.steps()) > max(last) + 300)
    guest.stop()
    return guest.check().pages_mismatched


def test_stops_among_faults_lose_nothing():
    assert run_in_child(stop_between) == 0
