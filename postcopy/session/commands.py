"""What is to be done: commands that the two machines return and the interpreters in `link` perform, in order.

Not one of them carries a choice: whoever performs them decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from postcopy.session.states import Owner, State
from postcopy.wire.messages import Have, LayoutOffer, Message


@dataclass(frozen=True, slots=True)
class Command:
    """Base."""


# --- both sides -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send(Command):
    """Send a message over the control connection; answer NotSent if it is known to be closed already."""

    message: Message


@dataclass(frozen=True, slots=True)
class Note(Command):
    """Tell the log."""

    text: str


@dataclass(frozen=True, slots=True)
class StartPump(Command):
    """Let the data plane's threads run."""


@dataclass(frozen=True, slots=True)
class WatchData(Command):
    """From now on silence on a data connection is its end; a source says twice a second that it is there: AliveDue."""


@dataclass(frozen=True, slots=True)
class DropControl(Command):
    """Close the control connection at once, or the dialling of one: another one may follow."""


@dataclass(frozen=True, slots=True)
class CloseLinks(Command):
    """Close the control connection once what was sent is out, and data connections that no pump owns."""


@dataclass(frozen=True, slots=True)
class Connect(Command):
    """Dial the control connection: Connected, or WorkFailed at a source, DialFailed at a destination."""


@dataclass(frozen=True, slots=True)
class DialData(Command):
    """Dial urgent and push, prove them with id and token.

    A source is told DataConnected or WorkFailed, a destination DataAttached for both or DialFailed.
    """

    migration_id: bytes
    token: bytes = field(repr=False)  # a secret: never in a log


@dataclass(frozen=True, slots=True)
class Finish(Command):
    """The migration is over: `state` is its last, `owner` who may run the guest, `text` why, in one line."""

    state: State
    owner: Owner
    text: str
    exit_status: int


# --- source -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HandOver(Command):
    """Dial memory, prove it with id and token, send the files of all regions: FilesHanded or WorkFailed."""

    migration_id: bytes
    token: bytes


@dataclass(frozen=True, slots=True)
class KeepRecord(Command):
    """Write down, where somebody keeps it, what another agent needs to go on in this one's place."""


@dataclass(frozen=True, slots=True)
class NoteResidence(Command):
    """Keep in mind what the destination has, for the next DialData; WorkFailed where it makes no sense."""

    have: Have


@dataclass(frozen=True, slots=True)
class StopGuest(Command):
    """Park every vCPU and take the guest's state: GuestStopped or WorkFailed."""


@dataclass(frozen=True, slots=True)
class ResumeGuest(Command):
    """Let the guest run on here as if nothing had been.

    Only ever before Run is sent, or where the destination says that Run never came and the guest never ran there.
    """


@dataclass(frozen=True, slots=True)
class StartPush(Command):
    """Send pages in the background."""


@dataclass(frozen=True, slots=True)
class StopPump(Command):
    """End the data plane's threads and close the data connections."""


@dataclass(frozen=True, slots=True)
class ReleaseMemory(Command):
    """Give the guest's memory back to the host."""


# --- destination ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TakeFiles(Command):
    """Receive a file for each region of this offer over the memory connection: FilesTaken or WorkFailed."""

    offer: LayoutOffer


@dataclass(frozen=True, slots=True)
class Prepare(Command):
    """Check everything that can fail, allocate, trap faults, build the pump: Prepared or WorkFailed.

    Where files were taken they are checked and mapped, and nothing is allocated.
    """

    offer: LayoutOffer


@dataclass(frozen=True, slots=True)
class TryOut(Command):
    """Do what Prepare does, undo it, and say what came of it and what this host is like: TriedOut."""

    offer: LayoutOffer


@dataclass(frozen=True, slots=True)
class Load(Command):
    """Restore the guest from this state without touching its memory: GuestLoaded or WorkFailed."""

    state: bytes
    stopped_at: float
    boot_id: str


@dataclass(frozen=True, slots=True)
class StartGuest(Command):
    """Run the guest here: GuestRunning. Only ever on receipt of Run."""


@dataclass(frozen=True, slots=True)
class MakeReport(Command):
    """Wait a moment for the guest's first step, if it has not made it, then sum up: AllResident or WorkFailed."""


@dataclass(frozen=True, slots=True)
class Settle(Command):
    """Every page is here: trap no faults any more. Data connections stay open until StopPump."""


@dataclass(frozen=True, slots=True)
class DetachData(Command):
    """Take the data connections from the pump: nothing half is left, and the guest is served with what is here."""


@dataclass(frozen=True, slots=True)
class TellResidence(Command):
    """Send Have messages for all pages of a pump that is detached."""


@dataclass(frozen=True, slots=True)
class ResumePump(Command):
    """Have a detached pump go on with the data connections that were attached since."""


@dataclass(frozen=True, slots=True)
class Poison(Command):
    """Give up the pages that are not here: whoever touches one gets SIGBUS, and nobody waits for one."""


@dataclass(frozen=True, slots=True)
class Discard(Command):
    """Throw away pump, guest state and memory: the guest never ran here."""


@dataclass(frozen=True, slots=True)
class HoldMemory(Command):
    """Never again close anything that keeps the guest's threads waiting: they would go on, on zeros."""
