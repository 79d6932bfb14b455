"""The machine that asks a destination what would come of a migration: every step times every event."""

import pytest

from postcopy.errors import ProtocolError
from postcopy.session import events
from postcopy.session.machine import SessionError
from postcopy.session.probe import ProbeMachine, Step
from postcopy.session.states import ENDED
from postcopy.wire.control import Hello, Probe, Welcome

from . import samples

PROBE = Probe(samples.OFFER.regions, samples.OFFER.guest)


def machine(step=Step.IDLE):
    made = ProbeMachine(Hello((2, 3), "test"), PROBE)
    made.step = step
    made.deadline = 0.0
    return made


def test_the_way_forward():
    asking = machine()
    said = [
        asking.handle(event)
        for event in (
            events.Started(0.0),
            events.Connected(1.0),
            events.Received(2.0, Welcome(3, *samples.IDENTITY, "test")),
            events.Received(3.0, samples.PROBED),
        )
    ]
    assert [samples.names(commands) for commands in said] == [
        ["Connect"],
        ["Send(Hello)"],
        ["Send(Probe)"],
        ["CloseLinks", "Finish(completed, source, 0)"],
    ]
    assert asking.answer == samples.PROBED


@pytest.mark.parametrize("version", [1, 4])
def test_a_version_that_has_no_probe_or_was_not_offered(version):
    asking = machine(Step.GREETING)
    commands = asking.handle(events.Received(1.0, Welcome(version, *samples.IDENTITY, "test")))
    assert samples.names(commands) == ["Send(Cancel)", "CloseLinks", "Finish(failed, source, 4)"]
    assert f"version {version}" in commands[-1].text
    assert "version 2" in commands[-1].text


@pytest.mark.parametrize("step", list(Step))
def test_every_event(step):
    for event in [*samples.of_source(1e6)]:
        asking = machine(step)
        if asking.state in ENDED:
            assert asking.handle(event) == []
        elif (step, asking.key(event)) in asking.table:
            names = samples.names(asking.handle(event))
            assert any(name.startswith("Finish") for name in names) == (asking.state in ENDED)
            assert not any(name.startswith(("Finish", "ResumeGuest", "StopGuest")) for name in names[:-1])
        else:
            expected = ProtocolError if isinstance(event, events.Received) else SessionError
            with pytest.raises(expected):
                asking.handle(event)
            assert asking.step is step
