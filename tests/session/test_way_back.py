"""A migration that is paused, and its way back, as transcripts: event, step that follows, commands."""

import pytest

from postcopy.session import events
from postcopy.wire.control import AllPlaced, Ready, Running, Welcome

from .samples import HAVE, IDENTITY, REPORT, destination, names, source
from .test_transcripts import DESTINATION_STORY, SOURCE_STORY, play, upto

END = "Finish(completed, destination, 0)"


def test_with_an_agent_that_knows_no_recovery_the_end_of_a_connection_is_a_loss():
    for happening in (events.ControlLost(2.0, "cut"), events.PumpBroken(2.0, "cut"), events.Elapsed(99.0)):
        machine = play(source(), upto(SOURCE_STORY, "active"))
        machine.version = 2
        assert names(machine.handle(happening)) == ["StopPump", "CloseLinks", "Finish(lost, lost, 6)"]
    machine = play(destination(), upto(DESTINATION_STORY, "active"))
    machine.version = 2
    commands = names(machine.handle(events.ControlLost(4.0, "cut")))
    assert commands == ["HoldMemory", "DetachData", "Poison", "CloseLinks", "Finish(lost, lost, 6)"]


BACK = [
    (events.ControlLost(2.0, "cut"), "paused", ["StopPump", "DropControl", "Note"]),
    (events.Elapsed(2.1), "redialling", ["Connect"]),
    (events.WorkFailed(2.2, "host", "no route"), "paused", ["StopPump", "DropControl"]),
    (events.Elapsed(2.5), "redialling", ["Connect"]),
    (events.Connected(2.6), "rejoining", ["Send(Resume)"]),
    (Welcome(3, IDENTITY[0], b"n" * 32, "x"), "rejoining", []),
    (HAVE, "rejoining", ["NoteResidence"]),
    (Ready(), "reattaching", ["DialData"]),
    (events.DataConnected(3.0), "active", ["StartPump", "WatchData", "StartPush", "Note"]),
    (Running(9.9), "active", []),
    (AllPlaced(REPORT), "completed", ["Send(Released)", "StopPump", "ReleaseMemory", "CloseLinks", END]),
]


def test_the_way_back_as_the_source_sees_it():
    machine = play(play(source(), upto(SOURCE_STORY, "active")), [(Running(5.3), "active", ["StartPush", "Note"])])
    play(machine, upto(BACK, "reattaching"))
    assert (machine.first_token, machine.token) == (IDENTITY[1], b"n" * 32)
    play(machine, BACK[len(upto(BACK, "reattaching")) :])
    assert machine.reconnects == 1
    assert machine.timeline.first_instruction_at == 5.3  # what is said again changes nothing


def test_the_way_back_as_the_destination_sees_it():
    machine = play(destination(), upto(DESTINATION_STORY, "active"))
    machine.handle(events.GuestRunning(3.0, 5.25))
    story = [
        (events.PumpBroken(4.0, "urgent closed"), "paused", ["DetachData", "DropControl", "Note"]),
        (events.Progressed(4.5, 9, 256, 1, 1, 4096), "paused", []),
        (events.PauseAsked(4.6, "user"), "paused", ["Note"]),
        (events.Rejoined(4.7, b"1" * 32), "paused", ["Send(Refuse)", "DropControl"]),
        (events.ResumeAsked(4.8), "paused", ["Note"]),
        (
            events.Rejoined(5.0, b"2" * 32),
            "recovering",
            ["DetachData", "Send(Welcome)", "TellResidence", "Send(Ready)"],
        ),
        (events.DataAttached(5.1, "urgent"), "recovering", []),
        (
            events.Rejoined(5.2, b"3" * 32),
            "recovering",
            ["DetachData", "Send(Welcome)", "TellResidence", "Send(Ready)"],
        ),
        (events.DataAttached(5.3, "urgent"), "recovering", []),
        (events.DataAttached(5.4, "push"), "active", ["ResumePump", "Send(Running)", "Note"]),
    ]
    play(machine, story)
    assert machine.token == b"3" * 32
    assert machine.reconnects == 1


@pytest.mark.parametrize("text", ["given up", ""])
def test_a_pause_ends_by_itself_where_it_may_not_last(text):
    for machine, story in ((source(), SOURCE_STORY), (destination(), DESTINATION_STORY)):
        machine.give_up_seconds = 60.0
        play(machine, upto(story, "active"))
        machine.handle(events.ControlLost(10.0, "cut"))
        if text:
            commands = machine.handle(events.LoseAsked(11.0, text))
        else:
            assert machine.give_up_at == 70.0
            commands = machine.handle(events.Elapsed(70.0))
        assert names(commands)[-1] == "Finish(lost, lost, 6)"
        assert "Send(Refuse)" not in names(commands)  # nobody is there to hear it


def test_what_a_source_that_comes_back_is_told():
    machine = play(destination(), upto(DESTINATION_STORY, "loaded"))
    assert machine.refusal_of_return() is None
    machine.handle(events.ControlLost(4.0, "cut"))
    assert machine.refusal_of_return().code == "unrun"
    machine = play(destination(), upto(DESTINATION_STORY, "active"))
    machine.handle(events.LoseAsked(4.0, "enough"))
    assert machine.refusal_of_return().code == "lost"
    assert play(destination(), upto(DESTINATION_STORY, "attached")).refusal_of_return().code == "unknown"
