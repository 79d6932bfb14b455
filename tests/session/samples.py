"""One event of every kind, for both machines: what the tests feed them."""

import zlib
from dataclasses import replace

from postcopy.session import events
from postcopy.session.destination import DestinationMachine
from postcopy.session.source import SourceMachine
from postcopy.wire.control import (
    Alive,
    AllPlaced,
    Cancel,
    GuestOffer,
    Have,
    Hello,
    LayoutOffer,
    Loaded,
    Probe,
    Probed,
    Progress,
    Ready,
    Refuse,
    RegionOffer,
    Released,
    Resume,
    Run,
    Running,
    State,
    Welcome,
)
from postcopy.wire.latencies import Latencies, SparseHistogram

OFFER = LayoutOffer((RegionOffer("shmem", 4096, 1 << 20),), GuestOffer("emulated", 2))
HANDED_OVER = replace(OFFER, memory="handed-over")
IDENTITY = (b"i" * 16, b"t" * 32)
REPORT = {"pages": {"total": 256, "demand": 6, "push": 250, "zero": 0}}

LATENCIES = Latencies(SparseHistogram(((352, 2), (500, 1)), 250_000, 180_000), (SparseHistogram(((400, 7),), 9, 9),))

PROBED = Probed("ready", "", "auto", {"kernel": "6.18"})

HAVE = Have(0, 0, 8, zlib.compress(b"\xff"))

MESSAGES = (
    Hello((2, 3), "test"),
    Welcome(3, *IDENTITY, "test"),
    Refuse("host", "no huge pages"),
    OFFER,
    HANDED_OVER,
    Ready(),
    State(b"state", 5.0, "boot"),
    Loaded(),
    Run(),
    Running(5.25),
    Progress(1, 256, 3, LATENCIES),
    AllPlaced(REPORT, LATENCIES),
    Released(),
    Cancel("enough"),
    Refuse("lost", "given up"),
    Refuse("unrun", "it never ran here"),
    Resume(*IDENTITY),
    HAVE,
    Alive(),
    Probe(OFFER.regions, OFFER.guest),
    PROBED,
)


def both(now: float) -> list[events.Event]:
    """Events that either side may meet, among them every message."""
    return [
        *(events.Received(now, message) for message in MESSAGES),
        events.ControlLost(now, "cut"),
        events.NotSent(now, Ready(), "cut"),
        events.Broken(now, "nonsense"),
        events.WorkFailed(now, "host", "no room", 3),
        events.PumpFailed(now, "the kernel refused"),
        events.PumpBroken(now, "urgent closed"),
        events.PauseAsked(now, "user"),
        events.ResumeAsked(now),
        events.LoseAsked(now, "user"),
        events.CancelAsked(now, "user"),
        events.Elapsed(now),
    ]


def of_source(now: float) -> list[events.Event]:
    """Return everything that may happen to a source."""
    return [
        *both(now),
        events.NotSent(now, Run(), "cut"),
        events.Started(now, None),
        events.PushAsked(now),
        events.Connected(now),
        events.AliveDue(now),
        events.DataConnected(now),
        events.FilesHanded(now),
        events.GuestStopped(now, b"state", 5.0, "boot"),
    ]


def of_destination(now: float) -> list[events.Event]:
    """Return everything that may happen to a destination."""
    return [
        *both(now),
        events.Received(now, Hello((8, 9), "from the future")),
        events.FilesTaken(now),
        events.Connected(now, b"n" * 32),
        events.DialFailed(now, "refused"),
        events.Prepared(now),
        events.TriedOut(now, PROBED),
        events.DataAttached(now, "urgent", IDENTITY[1]),
        events.DataAttached(now, "urgent", b"o" * 32),
        events.Rejoined(now, b"r" * 32),
        events.GuestLoaded(now),
        events.GuestRunning(now, 5.25),
        events.Progressed(now, 1, 256, 3, 0, 100, 0, LATENCIES),
        events.Resident(now),
        events.AllResident(now, REPORT, LATENCIES),
    ]


def source(push: bool = True, offer: LayoutOffer = OFFER, versions: tuple[int, int] = (2, 3)) -> SourceMachine:
    return SourceMachine(Hello(versions, "test"), offer, push=push)


def destination(boot: str = "boot", versions: tuple[int, int] = (2, 3)) -> DestinationMachine:
    return DestinationMachine(versions, IDENTITY, "test", boot, 0.0)


def names(commands: list[object]) -> list[str]:
    """Commands in short: `Send(Run)`, `StopPump`, `Finish(lost, 6)`."""
    words = []
    for command in commands:
        name = type(command).__name__
        if name == "Send":
            name = f"Send({type(command.message).__name__})"
        elif name == "Finish":
            name = f"Finish({command.state}, {command.owner}, {command.exit_status})"
        words.append(name)
    return words
