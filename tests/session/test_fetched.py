"""A destination that fetches: what it asks for becomes the offer; all else is a migration as any."""

from __future__ import annotations

import pytest

from postcopy.errors import ProtocolError
from postcopy.session import events
from postcopy.session.fetched import FetchedMachine
from postcopy.wire.control import AllPlaced, Hello, Loaded, Piece, Ready, Running, Welcome
from postcopy.wire.messages import ALL, ASKED_FOR
from tests.session.samples import IDENTITY, REPORT, destination, names, source

SIZE = 64 << 20
PIECES = (Piece(0, 16 << 20, 4096), Piece(16 << 20, 48 << 20, 2 << 20))


def fetched():
    machine = FetchedMachine(Hello((3, 3), "x"), SIZE)
    machine.handle(events.Started(1.0))
    return machine


def welcome(*pieces, pages=ALL):
    return events.Received(1.1, Welcome(3, *IDENTITY, "x", tuple(pieces), pages))


@pytest.mark.parametrize("pages", [ALL, ASKED_FOR])
def test_the_offer_is_what_was_asked_for_and_so_is_the_push(pages):
    machine = fetched()
    (send,) = machine.handle(welcome(*PIECES, pages=pages))
    offer = send.message
    assert [(region.size, region.page_size) for region in offer.regions] == [(16 << 20, 4096), (48 << 20, 2 << 20)]
    assert machine.pieces == PIECES
    assert machine.pages == 4096 + 24
    for event in (
        events.Received(1.2, Ready()),
        events.DataConnected(1.3),
        events.GuestStopped(1.4, b"", 1.4, "boot"),
        events.Received(1.5, Loaded()),
    ):
        machine.handle(event)
    pushed = names(machine.handle(events.Received(1.6, Running(0.0))))
    assert ("StartPush" in pushed) is (pages == ALL)
    assert "ReleaseMemory" in names(machine.handle(events.Received(1.7, AllPlaced(REPORT))))


@pytest.mark.parametrize(
    ("piece", "text"),
    [
        (Piece(SIZE - 4096, 8192, 4096), "beyond the snapshot's memory file, which has 67108864 bytes"),
        (Piece(SIZE, 4096, 4096), "beyond the snapshot's memory file"),
        (Piece((1 << 63) - 4096, (1 << 63) - 4096, 4096), "beyond the snapshot's memory file"),
        (Piece(512, 4096, 4096), "no whole pages of 4096 bytes"),
        (Piece(0, 4096 + 512, 4096), "no whole pages"),
        (Piece(4096, 2 << 20, 2 << 20), "no whole pages of 2097152 bytes"),
        (Piece(0, 12288, 12288), "page size 12288 is not a power of two"),
    ],
)
def test_what_the_file_has_not_got_is_refused_with_the_mapping_named(piece, text):
    machine = fetched()
    commands = machine.handle(welcome(PIECES[0], piece))
    assert names(commands) == ["Send(Refuse)", "CloseLinks", "Finish(failed, source, 4)"]
    assert commands[0].message.text == commands[-1].text
    assert commands[-1].text.startswith("mapping 1 (")
    assert text in commands[-1].text


def test_pieces_that_overlap_are_refused_for_each_could_be_the_whole_file():
    machine = fetched()
    commands = machine.handle(welcome(Piece(16 << 20, 16 << 20, 4096), Piece(0, (16 << 20) + 4096, 4096)))
    assert names(commands) == ["Send(Refuse)", "CloseLinks", "Finish(failed, source, 4)"]
    assert commands[-1].text == "mappings 1 and 0 are of the same part of the snapshot's memory file"


def test_who_asks_for_nothing_or_did_not_dial_breaks_the_protocol():
    with pytest.raises(ProtocolError, match="asks for nothing"):
        fetched().handle(welcome())
    machine = source()
    machine.handle(events.Started(1.0))
    machine.handle(events.Connected(1.0))
    with pytest.raises(ProtocolError, match="did not dial"):
        machine.handle(welcome(*PIECES))


def test_a_destination_asks_with_its_welcome():
    machine = destination()
    machine.pieces, machine.pages = PIECES, ASKED_FOR
    (send,) = machine.handle(events.Received(1.0, Hello((3, 3), "x")))
    assert (send.message.pieces, send.message.pages) == (PIECES, ASKED_FOR)
