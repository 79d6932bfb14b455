"""Every step times every event: listed and then sound, or refused and then without effect."""

import pytest

from postcopy.errors import ProtocolError
from postcopy.session import destination as destination_room
from postcopy.session import events
from postcopy.session import source as source_room
from postcopy.session.destination_steps import Step
from postcopy.session.machine import SessionError
from postcopy.session.states import ENDED, SWITCHED, State
from postcopy.wire.control import Run

from . import samples

LATE = 1e6  # after every deadline


def machine_in(room, step, offer=samples.OFFER):
    machine = samples.source(offer=offer) if room is source_room else samples.destination()
    if room is destination_room and offer.handed_over:
        machine.offer, machine.resident = offer, True
    machine.step = step
    machine.version = 3
    machine.migration_id, machine.token = samples.IDENTITY
    machine.first_token = machine.token
    machine.deadline = 0.0
    return machine


CASES = [
    (room, step, event)
    for room, made in ((source_room, samples.of_source), (destination_room, samples.of_destination))
    for step in room.Step
    for event in made(LATE)
]


@pytest.mark.parametrize("offer", [samples.OFFER, samples.HANDED_OVER], ids=["sent", "handed over"])
@pytest.mark.parametrize("room", [source_room, destination_room])
def test_every_state_and_every_event(room, offer):
    seen = 0
    for where, step, event in CASES:
        if where is not room:
            continue
        seen += 1
        machine = machine_in(room, step, offer)
        listed = (step, machine.key(event)) in machine.table
        if machine.ended:
            assert machine.handle(event) == []
            assert machine.step is step
        elif listed:
            commands = machine.handle(event)
            check_sound(room, step, event, machine, samples.names(commands))
            assert not offer.handed_over or "StartPush" not in samples.names(commands)
        else:
            expected = ProtocolError if isinstance(event, events.Received) else SessionError
            with pytest.raises(expected, match="in state"):
                machine.handle(event)
            assert machine.step is step
            assert machine.deadline == 0.0
    assert seen > 250


def check_sound(room, step, event, machine, commands):
    """What must hold of every line of the table, whatever it says."""
    ended = machine.ended
    assert not ended or machine.state in ENDED
    assert any(name.startswith("Finish") for name in commands) == ended
    if ended:
        assert commands[-1].startswith("Finish")
        assert "CloseLinks" in commands
    if room is source_room:
        check_source(step, event, machine, commands)
    else:
        check_destination(step, event, machine, commands)


def check_source(step, event, machine, commands):
    stopped = step in {source_room.Step.STOPPING, source_room.Step.LOADING}
    unsent = isinstance(event, events.NotSent) and isinstance(event.message, Run)
    if stopped and machine.state in {State.FAILED, State.CANCELLED}:
        assert commands[0] == "ResumeGuest"
    unrun = isinstance(event, events.Received) and getattr(event.message, "code", None) == "unrun"
    if "ResumeGuest" in commands:
        assert stopped or (step is source_room.Step.ACTIVE and unsent) or unrun
    if "Send(Run)" in commands:
        assert machine.state is State.POSTCOPY_ACTIVE
    if "ReleaseMemory" in commands:
        assert machine.state is State.COMPLETED
    if step in {source_room.Step.ACTIVE, *source_room.PAUSES} and not unsent and not unrun:
        assert machine.state in {*SWITCHED, State.COMPLETED, State.LOST}
    asked = isinstance(event, events.PauseAsked)
    if machine.step is source_room.Step.PAUSED and (step is not machine.step or asked):
        assert machine.held == asked
        assert ("KeepRecord" in commands) == machine.held
        assert commands[machine.held :][:2] == ["StopPump", "DropControl"]


WHOLE = {destination_room.Step.SETTLING, destination_room.Step.RELEASING}


def check_destination(step, event, machine, commands):
    if "StartGuest" in commands:
        assert step is destination_room.Step.LOADED
        run = isinstance(event, events.Received) and isinstance(event.message, Run)
        assert run or isinstance(event, events.Rejoined)  # who comes back has sent it
    if "Discard" in commands:
        assert step not in {destination_room.Step.ACTIVE, *destination_room.PAUSES, *WHOLE}
    if isinstance(event, events.PauseAsked) and machine.step is destination_room.Step.PAUSED:
        assert machine.held
        assert commands[0] == "KeepRecord"
    if step in WHOLE:  # every page is here: nothing that happens loses the guest
        assert machine.state is State.COMPLETED
        assert "HoldMemory" not in commands
    if step is destination_room.Step.SETTLING and machine.step is not step:
        assert commands[0] == "Settle"
    if machine.state is State.LOST:
        assert commands[0] == "HoldMemory"
        assert "StopPump" not in commands
    if machine.state is State.FAILED and step is not destination_room.Step.IDLE:
        assert "Discard" in commands


@pytest.mark.parametrize("room", [source_room, destination_room])
def test_every_step_but_the_last_ones_is_left_somehow(room):
    table = (source_room.SourceMachine if room is source_room else destination_room.DestinationMachine).table
    dials = set() if room is source_room else {Step.REDIALLING, Step.REJOINING, Step.RELOADING}  # where it fetches
    reached = {following for (start, _), (following, _) in table.items() if following is not start}
    assert set(room.Step) - reached - dials == {room.Step.IDLE}
    assert not reached & dials
    for step in set(room.Step) - dials:
        left = any(start is step and following is not step for (start, _), (following, _) in table.items())
        assert left == (step.value not in {"completed", "failed", "cancelled", "lost", "probed"})


@pytest.mark.parametrize("room", [source_room, destination_room])
def test_a_mistake_that_no_table_foresaw_ends_each_step_by_its_own_way_out(room):
    for step in room.Step:
        machine = machine_in(room, step)
        if machine.ended:
            continue
        event = events.WorkFailed(LATE, "internal", "internal error: KeyError()")
        commands = samples.names(machine.give_up(event))
        assert machine.ended
        assert machine.deadline is None
        check_sound(room, step, event, machine, commands)
        if room is source_room and step not in {source_room.Step.ACTIVE, *source_room.PAUSES}:
            assert commands[-1] == "Finish(failed, source, 4)"
        if step.value == "active" or step in room.PAUSES:
            assert commands[-1] == "Finish(lost, lost, 6)"
