"""A destination that dials and comes back: its way back as a transcript, and whom it does not take for its source."""

import pytest

from postcopy.errors import ProtocolError
from postcopy.limits import SILENCE_SECONDS
from postcopy.session import events
from postcopy.session.fetching import NAMELESS, FetchingMachine, take_up
from postcopy.session.states import State
from postcopy.wire.control import (
    AllPlaced,
    GuestOffer,
    Hello,
    LayoutOffer,
    Loaded,
    Piece,
    Ready,
    Refuse,
    RegionOffer,
    Run,
    Welcome,
)
from postcopy.wire.control import State as StateMessage

from .samples import HAVE, IDENTITY, REPORT, names
from .test_fetched import PIECES as HALVES
from .test_fetched import fetched
from .test_transcripts import play, upto

PIECES = (Piece(0, 1 << 20, 4096),)
OFFER = LayoutOffer((RegionOffer("file", 4096, 1 << 20),), GuestOffer("outside", 1))
OTHER = LayoutOffer((RegionOffer("file", 4096, 2 << 20),), GuestOffer("outside", 1))
NAME = b"\x81\xa6memory\xc4\x10" + b"x" * 16
HELLO = Hello((3, 3), "x")
LOSES = ["HoldMemory", "DetachData", "Poison", "CloseLinks", "Finish(lost, lost, 6)"]
FAILS = ["DropControl", "DetachData", "Note"]
QUIETLY = ["DropControl", "DetachData"]


def state(name=NAME):
    return StateMessage(name, 1.0, "boot")


STORY = [
    (HELLO, "greeted", ["Send(Welcome)"]),
    (OFFER, "preparing", ["Prepare"]),
    (events.Prepared(1.0), "waiting", ["Send(Ready)"]),
    (events.DataAttached(1.1, "urgent", IDENTITY[1]), "waiting", []),
    (events.DataAttached(1.1, "push", IDENTITY[1]), "attached", ["StartPump"]),
    (state(), "loading", ["Load"]),
    (events.GuestLoaded(1.5), "loaded", ["Send(Loaded)"]),
    (Run(), "active", ["StartGuest", "WatchData"]),
    (events.GuestRunning(1.7, 1.65), "active", ["Send(Running)"]),
]

BACK = [
    (events.PumpBroken(4.0, "urgent closed"), "paused", ["DetachData", "DropControl", "Note"]),
    (events.Elapsed(4.1), "redialling", ["Connect"]),
    (events.DialFailed(4.2, "refused"), "paused", FAILS),
    (events.Elapsed(4.5), "redialling", ["Connect"]),
    (events.Connected(4.6, b"n" * 32), "rejoining", []),
    (HELLO, "rejoining", ["Send(Welcome)"]),
    (OFFER, "recovering", ["DialData"]),
    (events.DataAttached(4.8, "urgent", b"n" * 32), "recovering", []),
    (events.DataAttached(4.8, "push", b"n" * 32), "reloading", ["TellResidence", "Send(Ready)"]),
    (state(), "reloading", ["Send(Loaded)"]),
    (Run(), "active", ["ResumePump", "Send(Running)", "Note"]),
]


def fetching(story=STORY, **options):
    machine = FetchingMachine((3, 3), IDENTITY, "test", "boot", 0.0, pieces=PIECES, **options)
    return play(machine, story)


def test_the_way_back_as_the_destination_sees_it():
    machine = play(fetching(), BACK)
    assert machine.token == b"n" * 32
    assert machine.reconnects == 1
    assert machine.attempts == 2  # until it has been back for a while
    assert machine.deadline == pytest.approx(machine.now + SILENCE_SECONDS)
    machine.handle(events.Progressed(5.5, 1, 256, 1, 0, 9))
    assert machine.attempts == 0
    play(machine, BACK)  # and again


def test_the_welcome_of_a_return_has_the_migrations_name_and_a_new_token_and_asks_for_the_same():
    machine = play(fetching(), upto(BACK, "rejoining"))
    (send,) = machine.handle(events.Received(4.7, HELLO))
    assert send.message == Welcome(3, IDENTITY[0], b"n" * 32, "test", PIECES, "all")


@pytest.mark.parametrize(
    ("step", "happening"),
    [
        ("rejoining", Hello((4, 5), "from the future")),
        ("rejoining", OTHER),
        ("reloading", state(NAME[:-1] + b"y")),
        ("reloading", state(NAMELESS)),
    ],
)
def test_no_page_comes_from_a_source_of_other_memory_and_it_is_said_once(step, happening):
    machine = play(fetching(), upto(BACK, step))
    machine.told = False
    play(machine, [(happening, "paused", FAILS)])
    play(machine, [(events.Elapsed(99.0), "redialling", ["Connect"]), *BACK[4:7][: 1 if step == "rejoining" else 3]])
    if step == "reloading":
        play(machine, BACK[7:9])
    play(machine, [(happening, "paused", QUIETLY)])
    assert "there" in machine.trouble


def test_a_source_that_names_nothing_is_not_come_back_to():
    story = [(state(NAMELESS), "loading", ["Load"]) if line[1] == "loading" else line for line in upto(STORY, "loaded")]
    machine = fetching(story)
    play(machine, [(Run(), "active", ["StartGuest"]), (events.ControlLost(2.0, "cut"), "lost", LOSES)])


@pytest.mark.parametrize(
    "name",
    [
        b"\x81\xa6memory\xc5\xff\xff" + b"\x03" * 0xFFFF,
        NAME[:9] + b"\x0f" + b"x" * 15,
        NAME[:8] + b"\xb0" + b"x" * 16,
        b"\x82\xa1x\xc0" + NAME[1:],
        b"\xc0",
        b"x",
        b"",
    ],
)
def test_a_source_that_names_its_memory_by_nothing_that_is_a_name_breaks_the_protocol_before_the_guest_is_ours(name):
    machine = fetching(upto(STORY, "attached"))
    with pytest.raises(ProtocolError):
        machine.handle(events.Received(1.4, state(name)))
    assert (machine.step, machine.memory) == ("attached", NAMELESS)


@pytest.mark.parametrize("step", ["redialling", "rejoining", "recovering", "reloading"])
def test_whatever_attempt_is_under_way_people_have_their_say(step):
    def away(**options):
        return play(fetching(**options), upto(BACK, step))

    held = away()
    assert names(held.handle(events.PauseAsked(9.0, "user"))) == ["KeepRecord", "DropControl", "DetachData", "Note"]
    assert (held.step, held.deadline) == ("paused", None)
    assert held.handle(events.Elapsed(99.0)) == []
    assert names(held.handle(events.ResumeAsked(99.0))) == ["KeepRecord", "DropControl", "DetachData", "Connect"]
    assert held.step == "redialling"
    again = away()
    assert names(again.handle(events.ResumeAsked(9.0))) == ["DropControl", "DetachData", "Connect"]
    given_up = away()
    commands = names(given_up.handle(events.LoseAsked(9.0, "user")))
    assert [one for one in commands if one != "Send(Refuse)"] == LOSES
    patient = away(give_up_seconds=60.0)
    assert patient.deadline <= 64.0
    assert patient.handle(events.Elapsed(64.1)) and patient.state is State.LOST  # noqa: PT018
    whole = away()
    play(whole, [(events.Resident(9.0), "settling", ["DropControl", "MakeReport"])])
    play(whole, [(events.DialFailed(9.1, "late"), "settling", []), (events.Connected(9.1, b"l" * 32), "settling", [])])
    play(whole, [(events.AllResident(9.2, REPORT), "releasing", ["Settle", "Send(AllPlaced)"])])
    no_source = events.NotSent(9.3, AllPlaced(REPORT), "there is no control connection")
    assert names(whole.handle(no_source))[-1] == "Finish(completed, destination, 0)"


@pytest.mark.parametrize("role", ["urgent", "push"])
def test_connections_that_stood_as_somebody_asked_to_resume_are_those_of_an_attempt_that_is_over(role):
    machine = play(fetching(), upto(BACK, "recovering"))
    machine.attached = {"urgent", "push"} - {role}
    late = events.DataAttached(9.1, role, b"n" * 32)
    play(machine, [(events.ResumeAsked(9.0), "redialling", ["DropControl", "DetachData", "Connect"])])
    play(machine, [(late, "redialling", []), (events.Connected(9.2, b"m" * 32), "rejoining", [])])
    play(
        machine, [(late, "rejoining", []), (HELLO, "rejoining", ["Send(Welcome)"]), (OFFER, "recovering", ["DialData"])]
    )
    play(machine, [(late, "recovering", []), (events.DataAttached(9.4, role, b"m" * 32), "recovering", [])])


def test_attempts_come_ever_more_seldom_and_a_step_of_one_takes_its_time_only():
    machine = play(fetching(), upto(BACK, "paused"))
    waits = []
    for _ in range(8):
        waits.append(machine.deadline - machine.now)
        machine.handle(events.Elapsed(machine.deadline))
        machine.handle(events.DialFailed(machine.now + 0.01, "refused"))
    assert waits == pytest.approx([0.05, 0.25, 0.5, 1.0, 2.0, 5.0, 5.0, 5.0])
    machine = play(fetching(), upto(BACK, "recovering"))
    play(machine, [(events.Elapsed(machine.deadline), "paused", FAILS)])


def test_a_fetch_that_is_cut_each_time_at_once_is_begun_anew_ever_more_seldom():
    machine, waits = fetching(), []
    for _ in range(8):
        machine.handle(events.PumpBroken(machine.now + 0.01, "urgent closed"))
        waits.append(machine.deadline - machine.now)
        play(machine, [(events.Elapsed(machine.deadline), "redialling", ["Connect"])])
        machine.handle(events.Connected(machine.now, b"n" * 32))
        for message in (HELLO, OFFER):
            machine.handle(events.Received(machine.now, message))
        for role in ("urgent", "push"):
            machine.handle(events.DataAttached(machine.now, role, b"n" * 32))
        for message in (state(), Run()):
            machine.handle(events.Received(machine.now, message))
        assert machine.step == "active"
    assert waits == pytest.approx([0.05, 0.25, 0.5, 1.0, 2.0, 5.0, 5.0, 5.0])
    machine.handle(events.Progressed(machine.now, 1, 256, 1, 0, 9))
    machine.handle(events.PumpBroken(machine.now, "urgent closed"))
    assert machine.deadline - machine.now == pytest.approx(0.05)


def test_what_its_source_gives_up_is_lost():
    assert names(fetching().handle(events.Received(2.0, Refuse("lost", "it was written to")))) == LOSES


def test_an_agent_that_takes_a_killed_ones_place_dials_at_once_and_knows_the_memory():
    machine = FetchingMachine((3, 3), IDENTITY, "test", "boot", 0.0, pieces=PIECES)
    take_up(machine, 7.0, 3, NAME, held=False)
    assert machine.state is State.POSTCOPY_PAUSED
    play(machine, [(events.Elapsed(7.0), "redialling", ["Connect"]), *BACK[4:9]])
    play(machine, [(state(NAME[:-1] + b"z"), "paused", FAILS)])


@pytest.mark.parametrize("give_up_seconds", [None, 60.0])
def test_an_agent_that_takes_the_place_of_one_that_was_asked_to_pause_dials_when_it_is_asked_to_resume(give_up_seconds):
    machine = FetchingMachine((3, 3), IDENTITY, "test", "boot", 0.0, pieces=PIECES, give_up_seconds=give_up_seconds)
    take_up(machine, 7.0, 3, NAME, held=True)
    assert machine.deadline == (give_up_seconds and 67.0)
    resumes = ["KeepRecord", "DropControl", "DetachData", "Connect"]
    play(machine, [(events.Elapsed(60.0), "paused", []), (events.ResumeAsked(61.0), "redialling", resumes)])


def test_the_source_lets_a_destination_go_and_takes_what_it_has_when_it_comes_back():
    welcome = Welcome(3, *IDENTITY, "x", HALVES)
    story = [
        (welcome, "offering", ["Send(LayoutOffer)"]),
        (HAVE, "offering", ["NoteResidence"]),
        (Ready(), "attaching", ["DialData"]),
        (events.DataConnected(1.4), "stopping", ["StartPump", "StopGuest"]),
        (events.GuestStopped(1.5, NAME, 1.45, "boot"), "loading", ["Send(State)"]),
        (Loaded(), "active", ["Send(Run)", "WatchData"]),
        (events.AliveDue(2.0), "active", ["Send(Alive)"]),
    ]
    goes = ["StopPump", "CloseLinks", "Finish(cancelled, destination, 5)"]
    for end in (
        events.ControlLost(3.0, "cut"),
        events.PumpBroken(3.0, "silent"),
        events.Elapsed(1.7 + SILENCE_SECONDS),
        events.CancelAsked(3.0, "the source ends"),
    ):
        machine = play(fetched(), story)
        assert names(machine.handle(end)) == goes
        assert machine.state is State.CANCELLED
    machine = play(fetched(), story)
    commands = machine.handle(events.PumpFailed(3.0, "it was written to"))
    assert names(commands) == ["Send(Refuse)", "StopPump", "CloseLinks", "Finish(lost, lost, 6)"]
    assert commands[0].message.code == "lost"
