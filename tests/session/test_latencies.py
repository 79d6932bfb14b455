"""How long faults and vCPUs wait at the destination: it says so, and the source knows what was said last."""

from dataclasses import replace

from postcopy.session import events
from postcopy.session.fetched import FetchedMachine
from postcopy.wire.control import AllPlaced, Progress, Welcome
from postcopy.wire.latencies import NOTHING

from .samples import IDENTITY, LATENCIES, REPORT, destination, source
from .test_transcripts import DESTINATION_STORY, SOURCE_STORY, play, upto

LATER = replace(LATENCIES, stalls=())


def test_a_destination_tells_them_with_its_progress_and_in_the_end():
    machine = play(destination(), upto(DESTINATION_STORY, "active"))
    (command,) = machine.handle(events.Progressed(2.0, 9, 256, 1, 1, 4096, 0, LATENCIES))
    assert command.message == Progress(9, 256, 1, LATENCIES)
    machine.handle(events.Resident(3.0))
    *_, command = machine.handle(events.AllResident(3.1, REPORT, LATER))
    assert command.message == AllPlaced(REPORT, LATER)


def test_a_source_knows_what_it_was_told_last_and_when():
    machine = play(source(), upto(SOURCE_STORY, "active"))
    assert (machine.latencies, machine.latencies_at) == (NOTHING, None)
    machine.handle(events.Received(2.0, Progress(9, 256, 1, LATENCIES)))
    assert (machine.latencies, machine.latencies_at) == (LATENCIES, 2.0)
    machine.handle(events.PumpBroken(2.5, "urgent closed"))
    assert (machine.step, machine.latencies, machine.latencies_at) == ("paused", LATENCIES, 2.0)
    machine = play(source(), upto(SOURCE_STORY, "active"))
    machine.handle(events.Received(3.0, AllPlaced(REPORT, LATER)))
    assert (machine.step, machine.latencies, machine.latencies_at) == ("completed", LATER, 3.0)


def test_a_destination_that_could_not_sum_up_takes_nothing_back():
    machine = play(source(), upto(SOURCE_STORY, "active"))
    machine.handle(events.Received(2.0, Progress(9, 256, 1, LATENCIES)))
    machine.handle(events.Received(3.0, AllPlaced({})))
    assert (machine.step, machine.latencies, machine.latencies_at) == ("completed", LATENCIES, 2.0)


def test_who_shows_them_to_nobody_keeps_none():
    machine = play(source(), upto(SOURCE_STORY, "active"))
    machine.shows_latencies = FetchedMachine.shows_latencies
    machine.handle(events.Received(2.0, Progress(9, 256, 1, LATENCIES)))
    assert (machine.placed_pages, machine.latencies) == (9, NOTHING)


def test_a_destination_of_an_older_version_tells_nothing():
    older = {Welcome(3, *IDENTITY, "x"): Welcome(2, *IDENTITY, "x")}
    machine = source()
    for what, *_ in upto(SOURCE_STORY, "active"):
        machine.handle(what if isinstance(what, events.Event) else events.Received(1.6, older.get(what, what)))
    assert (machine.step, machine.version) == ("active", 2)
    machine.handle(events.Received(2.0, Progress(9, 256, 1)))
    assert (machine.placed_pages, machine.latencies_at) == (9, None)
    machine.handle(events.Received(3.0, AllPlaced(REPORT)))
    assert (machine.step, machine.latencies_at) == ("completed", None)
