"""Memory that waits for any source that dials: from the offer to Run there is one limit, whatever comes between."""

import pytest

from postcopy.limits import HEARD_OUT_SECONDS, OFFERED_SECONDS
from postcopy.session import events
from postcopy.session.offered import OfferedMachine
from postcopy.wire.control import Hello, Loaded, Run, State

from . import samples

OFFERED_AT = 3.0
RUN_BY = OFFERED_AT + OFFERED_SECONDS
LATE = RUN_BY - 0.5  # each word as late as may be


def offered():
    machine = OfferedMachine((2, 3), samples.IDENTITY, "test", "boot", 0.0)
    machine.handle(events.Received(1.0, Hello((2, 3), "test")))
    machine.handle(events.Received(OFFERED_AT, samples.OFFER))
    return machine


WAY = (
    ("preparing", []),
    ("waiting", [events.Prepared(LATE)]),
    ("attached", [events.DataAttached(LATE, role, samples.IDENTITY[1]) for role in ("urgent", "push")]),
    ("loading", [events.Received(LATE, State(b"", 0.0, "boot"))]),
    ("loaded", [events.GuestLoaded(LATE)]),
)


def come_to(step):
    machine = offered()
    for name, happens in WAY:
        for event in happens:
            machine.handle(event)
        assert (machine.step, machine.deadline) == (name, RUN_BY)
        if name == step:
            return machine
    raise AssertionError(step)


@pytest.mark.parametrize("step", ["preparing", "waiting", "attached", "loading"])
def test_a_source_is_refused_when_its_time_is_over(step):
    machine = come_to(step)
    commands = samples.names(machine.handle(events.Elapsed(RUN_BY)))
    assert (machine.state, "Discard" in commands) == ("failed", True)


def test_where_run_may_be_on_its_way_the_source_is_heard_out_and_then_left():
    machine = come_to("loaded")
    assert samples.names(machine.handle(events.Elapsed(RUN_BY))) == ["Send(Cancel)"]
    assert machine.deadline == RUN_BY + HEARD_OUT_SECONDS
    machine.handle(events.CancelAsked(RUN_BY + 1.0, "the process has ended"))
    assert machine.deadline == RUN_BY + HEARD_OUT_SECONDS
    commands = samples.names(machine.handle(events.Elapsed(RUN_BY + HEARD_OUT_SECONDS)))
    assert (machine.state, "Discard" in commands) == ("failed", True)
    assert machine.refusal_of_return().code == "unrun"  # so that a source whose Run crossed it takes its guest back


def test_run_counts_up_to_the_last_moment():
    machine = come_to("loaded")
    machine.handle(events.Elapsed(RUN_BY))
    assert "StartGuest" in samples.names(machine.handle(events.Received(RUN_BY + 1.0, Run())))
    assert machine.handle(events.Elapsed(RUN_BY + HEARD_OUT_SECONDS)) == []


def test_who_was_loaded_too_late_is_asked_at_once():
    machine = come_to("loading")
    assert samples.names(machine.handle(events.GuestLoaded(RUN_BY + 5.0))) == [f"Send({Loaded.__name__})"]
    assert machine.deadline == RUN_BY
    machine.handle(events.Elapsed(RUN_BY + 5.0))
    assert machine.deadline == RUN_BY + 5.0 + HEARD_OUT_SECONDS
