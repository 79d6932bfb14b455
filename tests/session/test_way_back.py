"""A migration that is paused, and its way back, as transcripts: event, step that follows, commands."""

import pytest

from postcopy.limits import SILENCE_SECONDS
from postcopy.session import events
from postcopy.wire.control import Alive, AllPlaced, Cancel, Progress, Ready, Refuse, Running, Welcome

from .samples import HAVE, IDENTITY, LATENCIES, REPORT, destination, names, source
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
    (events.WorkFailed(2.2, "host", "no route"), "paused", ["StopPump", "DropControl", "Note"]),
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


def test_why_attempts_fail_is_said_once_and_again_when_it_changes():
    machine = play(source(), upto(SOURCE_STORY, "active"))
    machine.handle(events.ControlLost(2.0, "no route"))  # as what comes of the first attempt
    texts = []
    for why in ("no route", "no route", "refused", "refused", "no route"):
        machine.handle(events.Elapsed(machine.deadline))
        commands = machine.handle(events.WorkFailed(machine.now, "host", why))
        texts += [command.text for command in commands if names([command]) == ["Note"]]
    assert texts == [f"paused still: {why}; it is tried again and again" for why in ("no route", "refused", "no route")]
    assert machine.attempts == 5


def test_a_way_back_that_is_cut_each_time_at_once_is_gone_ever_more_seldom():
    machine, waits = play(source(), upto(SOURCE_STORY, "active")), []
    for _ in range(8):
        machine.handle(events.ControlLost(machine.now + 0.01, "cut"))
        waits.append(machine.deadline - machine.now)
        play(machine, [(events.Elapsed(machine.deadline), "redialling", ["Connect"])])
        machine.handle(events.Connected(machine.now))
        for message in (Welcome(3, IDENTITY[0], b"n" * 32, "x"), Ready()):
            machine.handle(events.Received(machine.now, message))
        machine.handle(events.DataConnected(machine.now))
        assert machine.step == "active"
    assert waits == pytest.approx([0.05, 0.25, 0.5, 1.0, 2.0, 5.0, 5.0, 5.0])
    machine.handle(events.Received(machine.now, Progress(1, 256, 3)))
    machine.handle(events.ControlLost(machine.now, "cut"))
    assert machine.deadline - machine.now == pytest.approx(0.05)


def test_the_way_back_as_the_destination_sees_it():
    machine = play(destination(), upto(DESTINATION_STORY, "active"))
    machine.handle(events.GuestRunning(3.0, 5.25))
    story = [
        (events.PumpBroken(4.0, "urgent closed"), "paused", ["DetachData", "DropControl", "Note"]),
        (events.Progressed(4.5, 9, 256, 1, 1, 4096), "paused", []),
        (events.PauseAsked(4.6, "user"), "paused", ["KeepRecord", "Note"]),
        (events.Rejoined(4.7, b"1" * 32), "paused", ["Send(Refuse)", "DropControl"]),
        (events.ResumeAsked(4.8), "paused", ["KeepRecord", "Note"]),
        (
            events.Rejoined(5.0, b"2" * 32),
            "recovering",
            ["DetachData", "Send(Welcome)", "TellResidence", "Send(Ready)"],
        ),
        (events.DataAttached(5.1, "urgent", b"2" * 32), "recovering", []),
        (
            events.Rejoined(5.2, b"3" * 32),
            "recovering",
            ["DetachData", "Send(Welcome)", "TellResidence", "Send(Ready)"],
        ),
        (events.DataAttached(5.3, "urgent", b"3" * 32), "recovering", []),
        (events.DataAttached(5.4, "push", b"3" * 32), "active", ["ResumePump", "Send(Running)", "Note"]),
    ]
    play(machine, story)
    assert machine.token == b"3" * 32
    assert machine.reconnects == 1


def test_a_push_is_not_forgotten_with_an_attempt_in_which_running_came_before_the_connections():
    """Run arrived and Running did not: it is said on the way back, and may overtake the answers on urgent and push."""
    machine = play(play(source(), upto(SOURCE_STORY, "active")), upto(BACK, "reattaching"))
    story = [
        (Running(5.3), "reattaching", ["Note"]),
        (events.ControlLost(2.8, "cut"), "paused", ["StopPump", "DropControl", "Note"]),
        (events.Elapsed(4.0), "redialling", ["Connect"]),
        (events.Connected(4.1), "rejoining", ["Send(Resume)"]),
        (Welcome(3, IDENTITY[0], b"m" * 32, "x"), "rejoining", []),
        (Ready(), "reattaching", ["DialData"]),
        (events.DataConnected(4.5), "active", ["StartPump", "WatchData", "StartPush", "Note"]),
    ]
    play(machine, story)


def test_a_long_pause_is_not_held_against_a_source_that_is_back():
    """Faults wait all through a pause of ten seconds; the first look behind it may come before the first page does."""
    machine = play(destination(), upto(DESTINATION_STORY, "active"))
    machine.handle(events.ControlLost(4.0, "cut"))
    for look in range(20):
        play(machine, [(events.Progressed(4.0 + look / 2, 9, 256, 1, 1, 4096), "paused", [])])
    back = ["DetachData", "Send(Welcome)", "TellResidence", "Send(Ready)"]
    play(machine, [(events.Rejoined(14.0, b"2" * 32), "recovering", back)])
    machine.handle(events.DataAttached(14.1, "urgent", b"2" * 32))
    assert names(machine.handle(events.DataAttached(14.2, "push", b"2" * 32))) == ["ResumePump", "Note"]
    for look in range(12):
        play(machine, [(events.Progressed(14.5 + look / 2, 9, 256, 1, 1, 4096), "active", ["Send(Progress)"])])
        machine.handle(events.Received(14.6 + look / 2, Alive()))
    pause = ["DetachData", "DropControl", "Note"]
    play(machine, [(events.Progressed(20.5, 9, 256, 1, 1, 4096), "paused", pause)])


def test_a_source_is_not_waited_for_while_the_kernel_puts_off_what_it_sent():
    machine = play(destination(), upto(DESTINATION_STORY, "active"))
    for look in range(40):
        progressed = events.Progressed(2.0 + look / 2, 9, 256, 1, 1, 4096, retries=1 + look)
        assert names(machine.handle(progressed)) == ["Send(Progress)"]
        machine.handle(events.Received(2.1 + look / 2, Alive()))
    for look in range(12):  # and the looks count from where that ends
        assert names(machine.handle(events.Progressed(22.0 + look / 2, 9, 256, 1, 1, 4096, 40))) == ["Send(Progress)"]
        machine.handle(events.Received(22.1 + look / 2, Alive()))
    machine.handle(events.Progressed(28.0, 9, 256, 1, 1, 4096, 40))
    assert machine.state == "postcopy-paused"


def back_again(times):
    """Return a destination to which the source came back so many times, and which waits for data connections."""
    machine = play(destination(), upto(DESTINATION_STORY, "active"))
    machine.handle(events.ControlLost(4.0, "cut"))
    for number in range(1, times + 1):
        machine.handle(events.Rejoined(5.0, b"%d" % number * 32))
    return machine


def test_a_data_connection_that_was_let_in_as_its_attempt_ended_does_no_harm():
    """Both are in the queue at once: the end of control first, and what was let in just before it was read."""
    machine = back_again(1)
    story = [
        (events.DataAttached(5.1, "urgent", b"1" * 32), "recovering", []),
        (events.ControlLost(5.2, "cut"), "paused", ["DetachData", "DropControl", "Note"]),
        (events.DataAttached(5.2, "push", b"1" * 32), "paused", []),
    ]
    play(machine, story)


def test_a_data_connection_of_an_earlier_attempt_is_none_of_the_next():
    """The source came back once more while one was being let in: it is closed, and the next attempt has its own."""
    machine = back_again(2)
    story = [
        (events.DataAttached(5.2, "push", b"1" * 32), "recovering", []),
        (events.DataAttached(5.3, "urgent", b"2" * 32), "recovering", []),
        (events.DataAttached(5.4, "push", b"2" * 32), "active", ["ResumePump", "Note"]),
    ]
    play(machine, story)


@pytest.mark.parametrize("make", [source, destination])
def test_a_wish_to_resume_that_comes_as_it_has_resumed_changes_nothing(make):
    machine = play(make(), upto(SOURCE_STORY if make is source else DESTINATION_STORY, "active"))
    assert machine.handle(events.ResumeAsked(9.0)) == []
    assert machine.step == "active"


def test_a_source_that_comes_back_to_a_whole_guest_is_told_so_though_somebody_holds_the_migration():
    """The last page that was missing was given back by the guest while the migration was paused by hand."""
    machine = play(destination(), upto(DESTINATION_STORY, "active"))
    story = [
        (events.PauseAsked(4.0, "user"), "paused", ["KeepRecord", "DetachData", "DropControl", "Note"]),
        (events.Resident(4.5), "settling", ["MakeReport"]),
        (events.Rejoined(5.0, b"1" * 32), "settling", ["Send(Welcome)"]),
        (events.AllResident(5.1, REPORT, LATENCIES), "releasing", ["Settle", "Send(AllPlaced)"]),
    ]
    play(machine, story)
    again = machine.handle(events.Rejoined(5.2, b"2" * 32))
    assert again[-1].message == AllPlaced(REPORT, LATENCIES)


def test_a_destination_that_gives_up_before_run_as_the_source_comes_back_costs_an_attempt():
    """It was stopped for a while: the end of its connections waits in its queue before the source's return."""
    machine = play(play(source(), upto(SOURCE_STORY, "active")), upto(BACK, "rejoining"))
    story = [
        (Cancel("urgent closed"), "paused", ["StopPump", "DropControl", "Note"]),
        (events.Elapsed(9.0), "redialling", ["Connect"]),
        (events.Connected(9.1), "rejoining", ["Send(Resume)"]),
        (
            Refuse("unrun", "it never ran here"),
            "failed",
            ["ResumeGuest", "StopPump", "CloseLinks", "Finish(failed, source, 4)"],
        ),
    ]
    play(machine, story)


def test_connections_that_took_long_to_make_are_not_taken_for_silent_ones():
    """The last word is older than a silence may be, and yet the data connections have just been answered."""
    machine = play(play(source(), upto(SOURCE_STORY, "active")), upto(BACK, "reattaching"))
    machine.handle(events.DataConnected(6.0))
    machine.handle(events.AliveDue(6.1))
    assert machine.deadline == 6.0 + SILENCE_SECONDS
    machine = back_again(1)
    machine.handle(events.DataAttached(8.0, "urgent", b"1" * 32))
    machine.handle(events.DataAttached(9.0, "push", b"1" * 32))
    machine.handle(events.Progressed(9.1, 9, 256, 1, 1, 4096))
    assert machine.deadline == 9.0 + SILENCE_SECONDS


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
