"""A guest's state travels and is believed in nothing: it continues exactly, or it is refused with a ProtocolError."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy.errors import ProtocolError, UsageError
from postcopy.guest import WORKLOADS, Guest, GuestState
from tests.guest.memory import PAGE, Memory
from tests.guest.model import Model

EVERY = sorted(WORKLOADS)


@pytest.mark.parametrize("workload", EVERY)
@pytest.mark.parametrize("vcpus", [1, 2, 3])
def test_moves_while_it_runs_and_ends_as_if_it_had_not(workload: str, vcpus: int) -> None:
    """Stopped wherever it was, moved to other memory, again and again: the last memory is that of one long run."""
    pages, steps_max = 64, 20_000
    memories = [Memory(pages) for _ in range(5)]
    guest = Guest([memories[0]], workload=workload, vcpus=vcpus, seed=8, steps_per_second=200_000, steps_max=steps_max)
    guest.fill()
    for source, destination in itertools.pairwise(memories):
        before = sum(guest.steps())
        guest.start()
        until(lambda guest=guest, before=before: sum(guest.steps()) > before + 500)
        guest.stop()
        state = msgpack.unpackb(msgpack.packb(guest.save()))
        assert guest.check().pages_mismatched == 0
        guest.close()
        destination.write(source.read())
        guest = Guest.restore([destination], state)
        assert guest.save() == state
    guest.start()
    guest.wait()
    guest.stop()
    assert guest.steps() == [steps_max] * vcpus
    assert guest.check().pages_mismatched == 0
    state = guest.save()
    guest.close()
    model = Model(workload, vcpus, 8, state["nonce"], 56, holes=4, zeroed=4, stride=state["stride"])
    assert memories[-1].read() == model.memory([steps_max] * vcpus)
    for memory in memories:
        memory.close()


def until(condition: Any, deadline: float = 10.0) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "the deadline passed"


def sound() -> dict[str, Any]:
    return Model("zipf", 2, 1, 2, 14, holes=1, zeroed=1).state([100, 7])


HOSTILE: list[dict[str, Any]] = [
    {"kind": "kvm"},
    {"kind": None},
    {"version": 0},
    {"version": 1},  # had no hole_pages
    {"version": 3},
    {"version": True},
    {"workload": "rowhammer"},
    {"workload": 3},
    {"workload": "x" * 100_000},
    {"seed": -1},
    {"seed": 1 << 64},
    {"seed": True},
    {"seed": 1.0},
    {"nonce": 1 << 70_000},
    {"nonce": None},
    {"nonce": b"12345678"},
    {"guest_pages": 0},
    {"guest_pages": 17},
    {"guest_pages": 15},
    {"guest_pages": 1 << 62},
    {"blank_pages": -1},
    {"blank_pages": 16},
    {"blank_pages": 17},
    {"hole_pages": -1},
    {"hole_pages": 3},
    {"hole_pages": True},
    {"hole_pages": 1 << 64},
    {"stride": 0},
    {"stride": 7},
    {"stride": 15},
    {"stride": 1 << 63},
    {"random_start": 1},
    {"workload": "increment", "random_start": True, "vcpus": [[0, 0, 0]]},
    {"steps_max": -1},
    {"steps_max": 1 << 64},
    {"steps_max": False},
    {"steps_per_second": -5},
    {"steps_per_second": 10**10},
    {"vcpus": []},
    {"vcpus": None},
    {"vcpus": {}},
    {"vcpus": [[0, 0, 0]] * 513},
    {"vcpus": [[0, 0, 0]] * 1_000_000},
    {"vcpus": [[0, 0]]},
    {"vcpus": [[0, 0, 0, 0]]},
    {"vcpus": [["0", 0, 0]]},
    {"vcpus": [[0, True, 1]]},
    {"vcpus": [[0, -1, -1]]},
    {"vcpus": [[0, 56, 56]]},
    {"vcpus": [[1, 0, 55]]},
    {"vcpus": [[-1, 56, 0]]},
    {"vcpus": [[1 << 62, 0, 56 << 62]]},
    {"vcpus": [7]},
    {"extra": 1},
]


@pytest.mark.parametrize("changes", HOSTILE, ids="+".join)
def test_refuses_a_hostile_state(changes: dict[str, Any]) -> None:
    with Memory(16) as memory:
        with pytest.raises(ProtocolError) as refusal:
            Guest.restore([memory], sound() | changes)
        assert len(str(refusal.value)) < 300
        Guest.restore([memory], sound()).close()


@pytest.mark.parametrize(("blank", "holes"), [(0, 0), (1, 0), (2, 1), (5, 2)])
def test_half_of_the_blank_pages_of_version_1_are_holes(blank: int, holes: int) -> None:
    state = Model("random", 1, 1, 2, 16 - blank, holes=holes, zeroed=blank - holes).state([0])
    old = {name: value for name, value in state.items() if name != "hole_pages"} | {"version": 1}
    assert GuestState.from_map(old) == GuestState.from_map(state)
    for name in old.keys() - {"kind", "version"}:
        with pytest.raises(ProtocolError, match="missing or unknown"):
            GuestState.from_map({other: value for other, value in old.items() if other != name})


@pytest.mark.parametrize("pages", [1, 15, 17, 512])
def test_refuses_the_state_of_a_guest_of_another_size(pages: int) -> None:
    state = Model("random", 1, 1, 2, pages).state([0])
    with Memory(16) as memory, pytest.raises(ProtocolError, match=f"of {pages} guest pages, the memory here has 16"):
        Guest.restore([memory], state)


@pytest.mark.parametrize("missing", sorted(sound()))
def test_refuses_a_state_that_lacks_a_field(missing: str) -> None:
    state = sound()
    del state[missing]
    with pytest.raises(ProtocolError):
        GuestState.from_map(state)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=10,
)


@given(JUNK)
def test_junk_is_refused_and_nothing_else(junk: object) -> None:
    with pytest.raises(ProtocolError):
        GuestState.from_map(junk)


@given(st.dictionaries(st.sampled_from(sorted(sound())), JUNK | st.integers(0, 70), min_size=1))
@settings(max_examples=300)
def test_junk_in_a_field_is_refused_or_sound(changes: dict[str, Any]) -> None:
    state = sound() | changes
    with contextlib.suppress(ProtocolError):
        assert GuestState.from_map(state).to_map() == state


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"workload": "nothing"}, "known are"),
        ({"vcpus": 0}, "vCPUs"),
        ({"vcpus": 513}, "vCPUs"),
        ({"blank": 1.0}, "blank"),
        ({"blank": -0.1}, "blank"),
        ({"seed": -1}, "seed"),
        ({"workload": "stride", "stride": 0}, "stride"),
        ({"steps_max": -1}, "steps_max"),
        ({"cpus": [4095]}, "CPUs 4095"),
        ({"cpus": [-1]}, "CPUs -1"),
        ({"workload": "increment", "random_start": True}, "first page"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(arguments: dict[str, Any], text: str) -> None:
    with Memory(16) as memory, pytest.raises(UsageError, match=text):
        Guest([memory], **arguments)


def test_memory_of_no_whole_guest_pages_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no memory"):
        Guest([])
    with Memory(1) as memory:
        memory.region = type(memory.region)(0, "odd", 2048, 2048)
        with pytest.raises(UsageError, match=f"multiple of {PAGE}"):
            Guest([memory])
