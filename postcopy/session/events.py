"""What happens to a migration: the events that the interpreter hands to the two machines, with the time of each.

`now` is seconds on any clock that only goes forward; the machines compare it with nothing but earlier `now`s. Where
the guest's clock readings are set beside it (the parts of the downtime) it has to be CLOCK_MONOTONIC, as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from postcopy.wire.latencies import NOTHING, Latencies
from postcopy.wire.messages import Message, Probed


@dataclass(frozen=True, slots=True)
class Event:
    """Base: when it happened."""

    now: float


# --- both sides -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Received(Event):
    """A message came over the control connection."""

    message: Message


@dataclass(frozen=True, slots=True)
class ControlLost(Event):
    """The control connection ended or broke; `text` says how."""

    text: str


@dataclass(frozen=True, slots=True)
class NotSent(Event):
    """The message of the last `Send` met a connection known to be closed: not a byte of it left this process.

    It is handed in before any other event that waits, since it says what the machine must know to judge them.
    """

    message: Message
    text: str


@dataclass(frozen=True, slots=True)
class Broken(Event):
    """The other side broke the protocol: the decoder or the machine itself said so."""

    text: str


@dataclass(frozen=True, slots=True)
class WorkFailed(Event):
    """Something this side had to do went wrong (dial, prepare, stop, load).

    `code` is the code of a Refuse, `exit_status` what the command line makes of it.
    """

    code: str
    text: str
    exit_status: int = 4


@dataclass(frozen=True, slots=True)
class PumpFailed(Event):
    """The data plane gave up: a data connection broke, a frame was wrong, the kernel refused."""

    text: str


@dataclass(frozen=True, slots=True)
class PumpBroken(Event):
    """A data connection ended, broke, fell silent or brought what it may not: the data plane wants new ones."""

    text: str


@dataclass(frozen=True, slots=True)
class PauseAsked(Event):
    """Somebody on this side wants the connections closed after the switchover, and none until he says so."""

    text: str


@dataclass(frozen=True, slots=True)
class ResumeAsked(Event):
    """Somebody on this side wants a paused migration to go on: now, and again by itself from here on."""


@dataclass(frozen=True, slots=True)
class LoseAsked(Event):
    """Somebody on this side gives up what the other side still has, or this side ends and takes it along."""

    text: str


@dataclass(frozen=True, slots=True)
class CancelAsked(Event):
    """Somebody on this side wants the migration to end."""

    text: str


@dataclass(frozen=True, slots=True)
class Elapsed(Event):
    """`machine.deadline` has passed."""


@dataclass(frozen=True, slots=True)
class Connected(Event):
    """The control connection stands.

    `token` is fresh random bytes for the data connections of this attempt, where the destination dials them.
    """

    token: bytes = field(default=b"", repr=False)  # a secret: never in a log


# --- source -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started(Event):
    """A migration was asked for; `limit_seconds` is how long it may take until the switchover, None: no limit."""

    limit_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class PushAsked(Event):
    """Somebody wants pages to be sent in the background, too, in a migration that was begun without."""


@dataclass(frozen=True, slots=True)
class AliveDue(Event):
    """Half a second has passed since WatchData or the last of these."""


@dataclass(frozen=True, slots=True)
class DataConnected(Event):
    """Urgent and push connections stand and were accepted."""


@dataclass(frozen=True, slots=True)
class FilesHanded(Event):
    """The memory connection was accepted, and the files of all regions were sent over it.

    Handed in before the loop looks at what the destination makes of them.
    """


@dataclass(frozen=True, slots=True)
class GuestStopped(Event):
    """Every vCPU is parked since `stopped_at` seconds of CLOCK_MONOTONIC; `state` is its device state (msgpack)."""

    state: bytes
    stopped_at: float
    boot_id: str


# --- destination ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FilesTaken(Event):
    """A file for each region came over the memory connection; not one of them was looked at yet."""


@dataclass(frozen=True, slots=True)
class DialFailed(Event):
    """A source that is dialled could not be reached again, or took no data connection; `text` says why."""

    text: str


@dataclass(frozen=True, slots=True)
class Prepared(Event):
    """Memory is allocated and trapped, the pump is built: only the guest's state can fail now."""


@dataclass(frozen=True, slots=True)
class TriedOut(Event):
    """An offer was tried out and nothing of it is left: what is to be answered."""

    answer: Probed


@dataclass(frozen=True, slots=True)
class Rejoined(Event):
    """The source came back: a Resume that proved itself came over what is the control connection from here on.

    `token` is fresh random bytes for the data connections of this attempt.
    """

    token: bytes


@dataclass(frozen=True, slots=True)
class DataAttached(Event):
    """A data connection proved itself by `token` and belongs to the pump now; `role` is "urgent" or "push"."""

    role: str
    token: bytes = field(repr=False)  # a secret: never in a log


@dataclass(frozen=True, slots=True)
class GuestLoaded(Event):
    """The guest's state is restored; its vCPUs are ready and do not run."""


@dataclass(frozen=True, slots=True)
class GuestRunning(Event):
    """The guest has done its first step here, at `first_instruction_at` seconds of CLOCK_MONOTONIC."""

    first_instruction_at: float


@dataclass(frozen=True, slots=True)
class Progressed(Event):
    """A look at the pump, twice a second: pages placed, faults seen, pages that the source still owes an answer for.

    `retries`: how often the kernel put off placing what had come. Nothing more is received meanwhile. `latencies`: how
    long faults and vCPUs have waited, for the source to show.
    """

    placed_pages: int
    total_pages: int
    faults: int
    owed: int
    received_bytes: int
    retries: int = 0
    latencies: Latencies = NOTHING


@dataclass(frozen=True, slots=True)
class Resident(Event):
    """Every page is placed. Handed in before any other event that waits: none of them can lose the guest any more."""


@dataclass(frozen=True, slots=True)
class AllResident(Event):
    """MakeReport was done: `report` is the destination's part of the whole, `latencies` has the faults it sums up."""

    report: dict[str, object]
    latencies: Latencies = NOTHING
