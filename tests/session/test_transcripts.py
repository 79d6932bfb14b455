"""Whole migrations as transcripts: event, step that follows, commands. Golden: read them as the protocol's story."""

import pytest

from postcopy.errors import ProtocolError
from postcopy.session import events
from postcopy.session.machine import SessionError
from postcopy.session.states import State
from postcopy.wire.control import (
    AllPlaced,
    Cancel,
    Hello,
    Loaded,
    Progress,
    Ready,
    Refuse,
    Released,
    Run,
    Running,
    Welcome,
)
from postcopy.wire.control import State as StateMessage

from .samples import HANDED_OVER, IDENTITY, OFFER, REPORT, destination, names, source

SOURCE_STORY = [
    (events.Started(1.0, None), "dialling", ["Connect"]),
    (events.Connected(1.1), "greeting", ["Send(Hello)"]),
    (Welcome(3, *IDENTITY, "x"), "offering", ["Send(LayoutOffer)"]),
    (Ready(), "attaching", ["DialData"]),
    (events.DataConnected(1.4), "stopping", ["StartPump", "StopGuest"]),
    (events.GuestStopped(1.5, b"s", 1.45, "boot"), "loading", ["Send(State)"]),
    (Loaded(), "active", ["KeepRecord", "Send(Run)", "WatchData"]),
    (Running(1.7), "active", ["StartPush", "Note"]),
    (Progress(9, 256, 1), "active", []),
    (
        AllPlaced(REPORT),
        "completed",
        ["Send(Released)", "StopPump", "ReleaseMemory", "CloseLinks", "Finish(completed, destination, 0)"],
    ),
    (events.ControlLost(9.0, "closed"), "completed", []),
]

DESTINATION_STORY = [
    (Hello((2, 3), "x"), "greeted", ["Send(Welcome)"]),
    (OFFER, "preparing", ["Prepare"]),
    (events.Prepared(1.0), "waiting", ["Send(Ready)"]),
    (events.DataAttached(1.1, "urgent", IDENTITY[1]), "waiting", []),
    (events.DataAttached(1.1, "push", IDENTITY[1]), "attached", ["StartPump"]),
    (StateMessage(b"s", 1.45, "boot"), "loading", ["Load"]),
    (events.GuestLoaded(1.5), "loaded", ["Send(Loaded)"]),
    (Run(), "active", ["StartGuest", "WatchData"]),
    (events.GuestRunning(1.7, 1.65), "active", ["Send(Running)"]),
    (events.Progressed(2.0, 9, 256, 1, 1, 4096), "active", ["Send(Progress)"]),
    (events.Resident(3.0), "settling", ["MakeReport"]),
    (events.AllResident(3.1, REPORT), "releasing", ["Settle", "Send(AllPlaced)"]),
    (Released(), "completed", ["StopPump", "CloseLinks", "Finish(completed, destination, 0)"]),
]

SOURCE_HANDS_OVER = [
    (events.Started(1.0, None), "dialling", ["Connect"]),
    (events.Connected(1.1), "greeting", ["Send(Hello)"]),
    (Welcome(3, *IDENTITY, "x"), "handing", ["Send(LayoutOffer)", "HandOver"]),
    (events.FilesHanded(1.2), "offering", []),
    (Ready(), "stopping", ["StopGuest"]),
    (events.GuestStopped(1.5, b"s", 1.45, "boot"), "loading", ["Send(State)"]),
    (Loaded(), "active", ["Send(Run)"]),
    (Running(1.7), "active", ["Note"]),
    (
        AllPlaced(REPORT),
        "completed",
        ["Send(Released)", "StopPump", "ReleaseMemory", "CloseLinks", "Finish(completed, destination, 0)"],
    ),
]

DESTINATION_TAKES_OVER = [
    (Hello((2, 3), "x"), "greeted", ["Send(Welcome)"]),
    (HANDED_OVER, "taking", ["TakeFiles"]),
    (events.FilesTaken(1.0), "preparing", ["Prepare"]),
    (events.Prepared(1.1), "attached", ["StartPump", "Send(Ready)"]),
    (StateMessage(b"s", 1.45, "boot"), "loading", ["Load"]),
    (events.GuestLoaded(1.5), "loaded", ["Send(Loaded)"]),
    (Run(), "settling", ["StartGuest", "MakeReport"]),
    (events.GuestRunning(1.7, 1.65), "settling", ["Send(Running)"]),
    (events.AllResident(1.7, REPORT), "releasing", ["Settle", "Send(AllPlaced)"]),
    (Released(), "completed", ["StopPump", "CloseLinks", "Finish(completed, destination, 0)"]),
]


def play(machine, story):
    """Feed a story and check each line; messages come a tenth of a second after each other."""
    now = 0.0
    for happening, step, commands in story:
        now = happening.now if isinstance(happening, events.Event) else now + 0.1
        event = happening if isinstance(happening, events.Event) else events.Received(now, happening)
        assert names(machine.handle(event)) == commands, happening
        assert machine.step == step, happening
    return machine


def upto(story, step):
    """The beginning of a story, up to the first line that leads to `step`."""
    index = next(i for i, line in enumerate(story) if line[1] == step)
    return story[: index + 1]


def test_a_migration_as_the_source_sees_it():
    machine = play(source(), SOURCE_STORY)
    assert machine.state is State.COMPLETED
    assert machine.report == REPORT
    assert machine.timeline.exact
    assert machine.timeline.downtime == pytest.approx(1.7 - 1.45)
    assert set(machine.timeline.parts()) == {"stop", "load", "run"}
    assert machine.timeline.parts()["stop"] == pytest.approx(0.05)  # from the last step until the state was sent
    assert sum(machine.timeline.parts().values()) == pytest.approx(machine.timeline.downtime)


def test_a_migration_as_the_destination_sees_it():
    assert play(destination(), DESTINATION_STORY).state is State.COMPLETED


def test_memory_that_is_handed_over_as_both_see_it():
    machine = play(source(offer=HANDED_OVER), SOURCE_HANDS_OVER)
    assert machine.state is State.COMPLETED
    assert machine.placed_pages == 256
    assert play(destination(), DESTINATION_TAKES_OVER).state is State.COMPLETED


@pytest.mark.parametrize("step", ["handing", "offering", "stopping", "loading"])
@pytest.mark.parametrize("happening", [events.ControlLost(2.0, "cut"), events.WorkFailed(2.0, "host", "no", 3)])
def test_memory_that_was_handed_over_and_never_run_is_the_sources(step, happening):
    machine = play(source(offer=HANDED_OVER), upto(SOURCE_HANDS_OVER, step))
    commands = names(machine.handle(happening))
    assert (commands[0] == "ResumeGuest") == (step in {"stopping", "loading"})
    assert "ReleaseMemory" not in commands
    assert machine.state is State.FAILED


def test_a_destination_that_says_ready_before_it_has_the_files_broke_the_protocol():
    machine = play(source(offer=HANDED_OVER), upto(SOURCE_HANDS_OVER, "handing"))
    with pytest.raises(ProtocolError, match="Ready is not allowed in state setup"):
        machine.handle(events.Received(2.0, Ready()))


def test_a_destination_of_an_older_version_cannot_take_memory_over():
    machine = play(source(offer=HANDED_OVER), upto(SOURCE_HANDS_OVER, "greeting"))
    commands = machine.handle(events.Received(2.0, Welcome(2, *IDENTITY, "x")))
    assert names(commands) == ["Send(Cancel)", "CloseLinks", "Finish(failed, source, 4)"]
    why = "the destination speaks version 2 of the protocol, and memory is handed over from version 3 on"
    assert commands[-1].text == why


def test_memory_that_was_handed_over_needs_no_pump_once_run_may_be_on_its_way():
    machine = play(destination(), upto(DESTINATION_TAKES_OVER, "loaded"))
    assert machine.handle(events.PumpFailed(4.0, "the kernel refused")) == []
    assert "StartGuest" in names(machine.handle(events.Received(4.1, Run())))


@pytest.mark.parametrize("happening", [events.ControlLost(4.0, "cut"), events.Broken(4.0, "nonsense")])
@pytest.mark.parametrize("step", ["settling", "releasing"])
def test_with_run_the_guest_is_whole_and_the_source_may_go(step, happening):
    machine = play(destination(), upto(DESTINATION_TAKES_OVER, step))
    assert names(machine.handle(happening))[-1] == "Finish(completed, destination, 0)"


@pytest.mark.parametrize("step", ["taking", "preparing", "attached", "loading", "loaded"])
def test_before_run_what_was_handed_over_is_thrown_away(step):
    machine = play(destination(), upto(DESTINATION_TAKES_OVER, step))
    commands = names(machine.handle(events.ControlLost(4.0, "cut")))
    assert commands == ["Discard", "CloseLinks", "Finish(failed, source, 4)"]


def test_a_push_that_is_not_wanted_is_not_begun():
    story = [*upto(SOURCE_STORY, "active"), (Running(1.7), "active", ["Note"]), (Progress(9, 256, 1), "active", [])]
    play(source(push=False), story)


def test_a_guest_that_makes_no_step_does_not_hold_up_the_push():
    play(source(), [*upto(SOURCE_STORY, "active"), (Progress(0, 256, 0), "active", ["StartPush"])])


def test_across_hosts_the_downtime_is_the_sources_own():
    machine = play(destination(boot="another"), upto(DESTINATION_STORY, "active"))
    (command,) = machine.handle(events.GuestRunning(2.0, 77.0))
    assert command.message == Running(0.0)
    machine = play(source(), upto(SOURCE_STORY, "active"))
    machine.handle(events.Received(2.0, Running(0.0)))
    assert not machine.timeline.exact
    assert machine.timeline.downtime == pytest.approx(2.0 - 1.45)
    assert sum(machine.timeline.parts().values()) == pytest.approx(machine.timeline.downtime)


@pytest.mark.parametrize("step", ["stopping", "loading"])
@pytest.mark.parametrize(
    ("happening", "end", "goodbye"),
    [
        (events.ControlLost(2.0, "cut"), "Finish(failed, source, 4)", []),
        (events.PumpFailed(2.0, "urgent closed"), "Finish(failed, source, 4)", ["Send(Cancel)"]),
        (events.WorkFailed(2.0, "host", "no room", 3), "Finish(failed, source, 3)", ["Send(Cancel)"]),
        (events.Broken(2.0, "nonsense"), "Finish(failed, source, 4)", ["Send(Refuse)"]),
        (events.CancelAsked(2.0, "user"), "Finish(cancelled, source, 7)", ["Send(Cancel)"]),
        (events.Elapsed(99.0), "Finish(failed, source, 4)", ["Send(Cancel)"]),
        (events.Received(2.0, Refuse("host", "no room")), "Finish(failed, source, 4)", []),
        (events.Received(2.0, Cancel("no")), "Finish(cancelled, source, 7)", []),
    ],
)
def test_before_run_the_guest_comes_first(step, happening, end, goodbye):
    machine = play(source(), upto(SOURCE_STORY, step))
    assert names(machine.handle(happening)) == ["ResumeGuest", *goodbye, "StopPump", "CloseLinks", end]


@pytest.mark.parametrize(
    "happening",
    [
        events.ControlLost(2.0, "cut"),
        events.PumpBroken(2.0, "urgent closed"),
        events.Broken(2.0, "nonsense"),
        events.Elapsed(99.0),
        events.Received(2.0, Refuse("internal", "oops")),
        events.PauseAsked(2.0, "user"),
    ],
)
def test_after_run_the_source_never_resumes_the_guest_but_comes_back_to_the_migration(happening):
    machine = play(source(), upto(SOURCE_STORY, "active"))
    by_hand = isinstance(happening, events.PauseAsked)
    kept = ["KeepRecord"] if by_hand else []  # whoever takes its place is to wait, too
    assert names(machine.handle(happening)) == [*kept, "StopPump", "DropControl", "Note"]
    assert machine.state is State.POSTCOPY_PAUSED
    if by_hand:
        assert machine.deadline is None  # until somebody asks
    else:
        assert names(machine.handle(events.Elapsed(machine.deadline))) == ["Connect"]


def test_a_run_that_never_left_is_no_run():
    machine = play(source(), upto(SOURCE_STORY, "active"))
    commands = names(machine.handle(events.NotSent(2.0, Run(), "closed")))
    assert commands == ["ResumeGuest", "StopPump", "CloseLinks", "Finish(failed, source, 4)"]


def test_a_cancel_that_crossed_run_changes_nothing():
    machine = play(source(), upto(SOURCE_STORY, "active"))
    assert machine.handle(events.Received(2.0, Cancel("late"))) == []
    assert names(machine.handle(events.CancelAsked(2.0, "user"))) == ["Note"]
    assert machine.state is State.POSTCOPY_ACTIVE


def test_the_users_limit_cancels_and_a_steps_limit_fails():
    machine = source()
    machine.handle(events.Started(0.0, 3.0))
    machine.handle(events.Connected(1.0))
    assert machine.deadline == 3.0
    assert machine.handle(events.Elapsed(2.9)) == []
    assert names(machine.handle(events.Elapsed(3.0)))[-1] == "Finish(cancelled, source, 7)"
    machine = source()
    machine.handle(events.Started(0.0, None))
    assert names(machine.handle(events.Elapsed(machine.deadline)))[-1] == "Finish(failed, source, 4)"


def test_silence_after_run_is_a_pause_and_progress_is_not_silence():
    machine = play(source(), upto(SOURCE_STORY, "active"))
    first = machine.deadline
    machine.handle(events.Received(first - 0.1, Progress(1, 256, 0)))
    assert machine.handle(events.Elapsed(first)) == []
    assert machine.deadline - machine.now <= 3.0
    assert names(machine.handle(events.Elapsed(machine.deadline))) == ["StopPump", "DropControl", "Note"]


def test_a_version_that_nobody_speaks():
    machine = destination()
    commands = machine.handle(events.Received(0.0, Hello((8, 9), "x")))
    assert names(commands) == ["Send(Refuse)", "CloseLinks", "Finish(failed, source, 4)"]
    assert commands[0].message.text == "the source speaks version 8 to 9, this destination version 2 to 3"
    machine = play(source(), upto(SOURCE_STORY, "greeting"))
    with pytest.raises(ProtocolError, match="chose version 7: this agent speaks 2 to 3"):
        machine.handle(events.Received(2.0, Welcome(7, *IDENTITY, "x")))
    assert machine.step == "greeting"


def test_whoever_only_greets_and_whoever_only_welcomes_is_not_waited_for_long():
    machine = play(destination(), upto(DESTINATION_STORY, "greeted"))
    assert machine.deadline - machine.now <= 5.0
    assert names(machine.handle(events.Elapsed(machine.deadline)))[-1] == "Finish(failed, source, 4)"
    machine = source()
    play(machine, upto(SOURCE_STORY, "offering"))
    assert machine.deadline - machine.now <= 20.0


def test_state_before_both_connections_is_refused():
    machine = play(destination(), upto(DESTINATION_STORY, "waiting"))
    with pytest.raises(ProtocolError, match="State is not allowed in state setup"):
        machine.handle(events.Received(2.0, StateMessage(b"", 0.0, "b")))


def test_after_loaded_the_destination_asks_and_waits():
    machine = play(destination(), upto(DESTINATION_STORY, "loaded"))
    assert names(machine.handle(events.CancelAsked(2.0, "user"))) == ["Send(Cancel)"]
    assert names(machine.handle(events.Elapsed(99.0))) == ["Send(Cancel)"]
    assert machine.deadline is None
    assert names(machine.handle(events.Received(100.0, Run()))) == ["StartGuest", "WatchData"]


def test_a_source_that_owes_and_sends_nothing():
    machine = play(destination(), upto(DESTINATION_STORY, "active"))
    for look in range(13):
        assert names(machine.handle(events.Progressed(2.0 + look / 2, 9, 256, 1, 1, 4096))) == ["Send(Progress)"]
    commands = names(machine.handle(events.Progressed(8.5, 9, 256, 1, 1, 4096)))
    assert commands == ["DetachData", "DropControl", "Note"]
    assert machine.state is State.POSTCOPY_PAUSED


def test_an_agent_that_was_stopped_itself_has_not_waited():
    machine = play(destination(), upto(DESTINATION_STORY, "active"))
    for now in (2.0, 60.0, 60.5):
        assert names(machine.handle(events.Progressed(now, 9, 256, 1, 1, 4096))) == ["Send(Progress)"]


def test_a_source_that_owes_nothing_may_be_silent():
    machine = play(destination(), upto(DESTINATION_STORY, "active"))
    for now in (2.0, 60.0, 3600.0):
        assert names(machine.handle(events.Progressed(now, 9, 256, 1, 0, 4096))) == ["Send(Progress)"]


GOODBYES = [
    events.ControlLost(4.0, "cut"),
    events.Broken(4.0, "nonsense"),
    events.Received(4.0, Refuse("internal", "?")),
]


@pytest.mark.parametrize("happening", GOODBYES)
def test_once_every_page_is_here_no_connection_is_missed_even_before_the_report(happening):
    machine = play(destination(), upto(DESTINATION_STORY, "settling"))
    assert machine.state is State.COMPLETED
    assert not machine.ended
    assert machine.handle(events.NotSent(4.0, Progress(1, 1, 1), "closed")) == []
    commands = names(machine.handle(happening))
    assert commands == ["Settle", "StopPump", "CloseLinks", "Finish(completed, destination, 0)"]


def test_a_report_that_cannot_be_made_does_not_leave_the_source_waiting():
    machine = play(destination(), upto(DESTINATION_STORY, "settling"))
    commands = machine.handle(events.WorkFailed(4.0, "guest", "it does not add up"))
    assert names(commands) == ["Settle", "Send(AllPlaced)"]
    assert commands[1].message == AllPlaced({})
    assert machine.step == "releasing"


def test_a_small_guest_may_be_here_before_run_is():
    machine = play(destination(), upto(DESTINATION_STORY, "loaded"))
    assert machine.handle(events.Resident(1.6)) == []
    assert machine.step == "loaded"
    assert names(machine.handle(events.Received(1.7, Run()))) == ["StartGuest", "MakeReport"]
    assert machine.step == "settling"


@pytest.mark.parametrize("step", ["attached", "loading"])
def test_memory_that_comes_before_the_guest_has_stopped_is_refused(step):
    machine = play(destination(), upto(DESTINATION_STORY, step))
    commands = machine.handle(events.Resident(2.0))
    assert names(commands) == ["Send(Cancel)", "Discard", "CloseLinks", "Finish(failed, source, 4)"]


@pytest.mark.parametrize("line", range(7))
def test_a_push_that_is_asked_for_before_the_switchover_is_a_wish(line):
    """At whatever step it is asked for, and however often, the push begins once, and not before the guest has left."""
    wish = (events.PushAsked(9.0), SOURCE_STORY[line - 1][1] if line else "idle", [])
    story = [*SOURCE_STORY[:line], wish, wish, *SOURCE_STORY[line:9]]
    machine = source(push=False)
    for happening, step, commands in story:
        event = happening if isinstance(happening, events.Event) else events.Received(1.6, happening)
        assert names(machine.handle(event)) == commands, happening
        assert machine.step == step


def test_a_push_is_begun_once_and_again_only_after_it_stopped():
    machine = play(source(push=False), upto(SOURCE_STORY, "active"))
    assert names(machine.handle(events.PushAsked(2.0))) == ["StartPush"]
    assert machine.handle(events.PushAsked(2.1)) == []
    assert names(machine.handle(events.Received(2.2, Running(1.7)))) == ["Note"]
    assert names(machine.handle(events.WorkFailed(3.0, "host", "lseek"))) == ["Note"]
    assert names(machine.handle(events.PushAsked(3.1))) == ["StartPush"]


def test_more_pages_than_there_are_are_not_believed():
    machine = play(source(), upto(SOURCE_STORY, "active"))
    machine.handle(events.Received(2.0, Progress(1 << 40, 256, 1)))
    assert machine.placed_pages == 256


@pytest.mark.parametrize("happening", [*GOODBYES, events.Elapsed(99.0)])
def test_once_every_page_is_here_the_source_may_do_what_it_likes(happening):
    machine = play(destination(), upto(DESTINATION_STORY, "releasing"))
    assert machine.handle(events.PumpFailed(4.0, "urgent closed")) == []
    assert names(machine.handle(happening)) == ["StopPump", "CloseLinks", "Finish(completed, destination, 0)"]


def test_a_mistake_of_our_own_is_told_apart():
    with pytest.raises(SessionError, match="GuestStopped cannot happen in state none"):
        source().handle(events.GuestStopped(0.0, b"", 0.0, ""))
