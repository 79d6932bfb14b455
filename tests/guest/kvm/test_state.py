"""The device state from another agent is believed in nothing: one error that names what is wrong, never a crash."""

from __future__ import annotations

import contextlib
import copy
import struct

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postcopy.errors import ProtocolError
from postcopy.guest.kvm import abi
from postcopy.guest.kvm.guest import EmptyKvm, GuestTroubleError, KvmGuest
from tests.guest.memory import Memory
from tests.guest.test_state import until

PAGES = 64


@pytest.fixture(scope="module")
def saved():
    """Return the state of a guest of two vCPUs that has run, as it arrives."""
    with Memory(PAGES) as memory, KvmGuest([memory], seed=3) as guest:
        guest.fill()
        guest.start()
        until(lambda: min(guest.steps()) > 50)
        guest.stop()
        return msgpack.unpackb(msgpack.packb(guest.save()))


@pytest.fixture
def state(saved):
    """Return a state of one's own to spoil."""
    return copy.deepcopy(saved)


@pytest.fixture(scope="module")
def empty():
    """Return a machine that is ready for that guest, and takes any number of states that are refused."""
    with Memory(PAGES) as memory:
        machine = EmptyKvm([memory], 2, ())
        yield machine
        machine.close()


def changed(vcpu, **parts):
    return lambda state: state["vcpus"][vcpu].update(parts)


def program(**fields):
    return lambda state: state["program"].update({"vcpus": [[0, 0, 0]] * 2, **fields})


def leaf_of_tomorrow(state):
    state["cpuid"][0][3] += 1


SPOILED = [
    (lambda state: state.update(kind="emulated"), "kind 'emulated' is not 'kvm'"),
    (lambda state: state.update(version=2), "version 2 is not 1 to 1"),
    (lambda state: state.update(version=True), "version True is not 1 to 1"),
    (lambda state: state.pop("clock"), "missing or unknown fields: 'clock'"),
    (lambda state: state.update(extra=1), "missing or unknown fields: 'extra'"),
    (lambda state: state.update(clock=-1), "a clock or time stamp is -1"),
    (lambda state: state.update(clock=1 << 64), "a clock or time stamp is"),
    (lambda state: state.update(tsc_khz=1 << 4000), "its time stamps count a huge number kHz, here it is"),
    (lambda state: state.update(tsc_khz=7), "its time stamps count 7 kHz, here it is"),
    (lambda state: state.update(time_stamps=[1]), "1 time stamps of 2 vCPUs"),
    (lambda state: state.update(time_stamps=[1, "2"]), "a clock or time stamp is '2'"),
    (lambda state: state.update(irqchips=[]), "irqchips are not 3 times 512 bytes"),
    (lambda state: state.update(irqchips=[b"", b"", b""]), "irqchips are not 3 times 512 bytes"),
    (lambda state: state.update(irqchips=[None] * 100), "irqchips are not 3 times 512 bytes"),
    (lambda state: state.update(program={}), "missing or unknown fields"),
    (lambda state: state["program"].update(workload="zipf", vcpus=[[0, 0, 0]] * 2), "does not know the workload zipf"),
    (
        lambda state: state["program"].update(guest_pages=58, vcpus=[[0, 0, 0]] * 2),
        "it is of 58 guest pages, the memory here has 57",
    ),
    (lambda state: state["program"].update(vcpus=[[0, 0, 0]]), "1 vCPUs, and 2 were announced"),
    (lambda state: state["program"].update(vcpus=[[0, 0, 0]] * 2), "vCPU 0: its registers say other steps"),
    (lambda state: state["vcpus"].pop(), "the program is of 2 vCPUs, the machine of 1"),
    (lambda state: state["vcpus"].append({}), "the program is of 2 vCPUs, the machine of 3"),
    (lambda state: state.update(vcpus=[1, 2]), "a vCPU is 1, not a map"),
    (lambda state: state["vcpus"][1].pop("lapic"), "missing or unknown parts of a vCPU: 'lapic'"),
    (changed(1, regs=b"x" * 143), "regs of a vCPU has 143 bytes, 144 on this host"),
    (changed(0, xsave=b"x" * 5000), "xsave of a vCPU has 5000 bytes"),
    (changed(0, events="text"), "events of a vCPU is 'text', not bytes"),
    (changed(0, msrs=None), "msrs of a vCPU are None, or too many"),
    (changed(0, msrs=[[0x10, 1]] * 100_000), "msrs of a vCPU are a list, or too many"),
    (changed(0, msrs=[[1, 2, 3]]), "an MSR is a list, not"),
    (changed(0, msrs=[[-1, 2]]), "MSR -1 with 2, or twice"),
    (changed(0, msrs=[[0xC0000080, 1 << 64]]), "MSR 3221225600 with"),
    (changed(0, msrs=[[0xC0000081, 0], [0xC0000081, 0]]), "or twice"),
    (changed(1, msrs=[[0xDEAD, 0]]), "it has MSR 0xdead, which this host's processors have not"),
    (changed(1, msrs=[[0x4B564D00, 0]]), "it has MSR 0x4b564d00, which"),  # KVM's clock: it writes to memory
    (changed(1, msrs=[[0x40000001, 1]]), "it has MSR 0x40000001, which"),  # Hyper-V's page of calls: it does, too
    (changed(1, msrs=[[0xC0000082, 1 << 63 | 1]]), "KVM does not take 0x8000000000000001 for MSR 0xc0000082"),
    (changed(1, sregs=b"\xff" * abi.SREGS_BYTES), "setting sregs of a vCPU"),
    (changed(1, xcrs=b"\xff" * abi.XCRS_BYTES), "setting xcrs of a vCPU"),
    (changed(1, events=b"\xff" * abi.EVENTS_BYTES), "setting events of a vCPU"),
    (changed(1, debugregs=b"\xff" * abi.DEBUGREGS_BYTES), "setting debugregs of a vCPU"),
    (changed(1, mp_state=b"\xff" * abi.MP_STATE_BYTES), "setting mp_state of a vCPU"),
    (leaf_of_tomorrow, "its processor is another one than this host's (CPUID leaf 0x"),
    (lambda state: state["cpuid"].pop(), "its processor is another one than this host's (CPUID leaf 0x"),
    (lambda state: state.update(cpuid=[[1, 2]]), "an entry of cpuid is a list, not seven numbers"),
    (lambda state: state["cpuid"].append([1 << 40, 0, 0, 0, 0, 0, 0]), "CPUID leaf 0x10000000000 differs"),
]


@pytest.mark.parametrize(("spoil", "text"), SPOILED, ids=[text for _, text in SPOILED])
def test_what_is_wrong_is_named(spoil, text, state, empty):
    spoil(state)
    with pytest.raises(ProtocolError) as refused:
        empty.load(state)
    assert str(refused.value).startswith("guest state: ")
    assert text in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("state", [None, [], "kvm", 7, b"", {}, {"kind": "kvm"}])
def test_what_is_no_state_at_all(state, empty):
    with pytest.raises(ProtocolError, match="guest state: "):
        empty.load(state)


def places(state, path=()):
    """Yield the way to every value in a state."""
    inside = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in inside:
        yield (*path, key)
        yield from places(value, (*path, key))


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_value_of_anything_anywhere(saved, data):
    """Refused in words, or a guest: one whose processor may do what it likes, and which ends when it is told to."""
    state = copy.deepcopy(saved)
    way = data.draw(st.sampled_from(list(places(saved))))
    place = state
    for key in way[:-1]:
        place = place[key]
    old = place[way[-1]]
    odd = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=9)
        | st.binary(max_size=9)
        | st.just([])
        | st.just({})
    )
    if isinstance(old, bytes):
        odd |= st.binary(min_size=len(old), max_size=len(old))
        odd |= st.tuples(st.integers(0, len(old) - 1), st.binary(min_size=1, max_size=8)).map(
            lambda change: (old[: change[0]] + change[1] + old[change[0] :])[: len(old)]
        )
    place[way[-1]] = data.draw(odd)
    with (
        Memory(PAGES) as memory,
        contextlib.closing(EmptyKvm([memory], 2, ())) as machine,
        contextlib.suppress(ProtocolError, GuestTroubleError),
        machine.load(state) as guest,
    ):
        guest.start()
        guest.stop()
        assert guest.check().pages_mismatched > 0, "there is nothing in memory"


def test_registers_of_anywhere_do_the_guest_no_good_and_nobody_harm(state):
    """It runs at an address where nothing is, in a mode of its own choice."""
    numbers = list(struct.unpack("=18Q", state["vcpus"][0]["regs"]))
    numbers[abi.REGISTERS.index("rip")] = 0x123456789
    state["vcpus"][0]["regs"] = struct.pack("=18Q", *numbers)
    with Memory(PAGES) as memory, EmptyKvm([memory], 2, ()).load(state) as guest:
        guest.start()
        until(lambda: guest.trouble is not None)
        guest.stop()
        with pytest.raises(GuestTroubleError):
            guest.check()
