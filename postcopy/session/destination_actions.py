"""What a destination does at each line of the table in destination.py: (machine, what happened) -> commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from postcopy.session.commands import (
    CloseLinks,
    Command,
    Discard,
    Finish,
    Load,
    MakeReport,
    Prepare,
    Send,
    Settle,
    StartGuest,
    StartPump,
    StopPump,
    TakeFiles,
    TryOut,
    WatchData,
)
from postcopy.session.destination_steps import Step
from postcopy.session.events import (
    AllResident,
    Broken,
    CancelAsked,
    ControlLost,
    DataAttached,
    Elapsed,
    Event,
    GuestRunning,
    NotSent,
    Progressed,
    PumpBroken,
    PumpFailed,
    Resident,
    TriedOut,
    WorkFailed,
)
from postcopy.session.states import Owner, State
from postcopy.wire.messages import (
    AllPlaced,
    Cancel,
    Hello,
    LayoutOffer,
    Loaded,
    Message,
    Probe,
    Progress,
    Ready,
    Refuse,
    Running,
    Welcome,
)
from postcopy.wire.messages import State as StateMessage
from postcopy.wire.version import common

if TYPE_CHECKING:
    from postcopy.session.destination import DestinationMachine

# --- the way forward, in the order in which it is gone ----------------------------------------------------


def welcome(machine: DestinationMachine, message: Hello) -> list[Command]:
    """Answer a Hello with the version, the migration's id and its token."""
    machine.version = common(message.versions, machine.versions)
    wanted = (machine.pieces, machine.pages)
    return [Send(Welcome(machine.version, machine.migration_id, machine.token, machine.software, *wanted))]


def refuse_version(machine: DestinationMachine, message: Hello) -> list[Command]:
    """Say that there is no common version."""
    low, high = machine.versions
    spoken = "version {} to {}".format(*message.versions)
    text = f"the source speaks {spoken}, this destination version {low} to {high}"
    return [Send(Refuse("version", text)), CloseLinks(), Finish(State.FAILED, Owner.SOURCE, text, 4)]


def prepare(_machine: DestinationMachine, offer: LayoutOffer) -> list[Command]:
    """Make room for the guest."""
    return [Prepare(offer)]


def take_files(machine: DestinationMachine, offer: LayoutOffer) -> list[Command]:
    """Wait for the memory itself: from the moment it is mapped every page is here."""
    machine.offer = offer
    machine.resident = True
    return [TakeFiles(offer)]


def prepare_files(machine: DestinationMachine, _event: Event) -> list[Command]:
    """Map the files of the offer that they came for."""
    return [] if machine.offer is None else [Prepare(machine.offer)]


def try_out(machine: DestinationMachine, probe: Probe) -> list[Command]:
    """See what would come of an offer."""
    machine.probed = True
    return [TryOut(probe.offer)]


def answer(_machine: DestinationMachine, event: TriedOut) -> list[Command]:
    """Say what came of trying out."""
    text = f"answered a probe: {event.answer.answer}"
    return [Send(event.answer), CloseLinks(), Finish(State.CANCELLED, Owner.SOURCE, text, 0)]


def ready(_machine: DestinationMachine, _event: Event) -> list[Command]:
    """Say that everything that can fail was tried."""
    return [Send(Ready())]


def ready_resident(_machine: DestinationMachine, _event: Event) -> list[Command]:
    """Say that everything that can fail was tried, with a pump where faults are to be trapped all the same."""
    return [StartPump(), Send(Ready())]


def attach(machine: DestinationMachine, event: DataAttached) -> list[Command]:
    """Take note of the first data connection."""
    machine.attached.add(event.role)
    return []


def attach_last(machine: DestinationMachine, event: DataAttached) -> list[Command]:
    """Let the pump run: both data connections are there."""
    machine.attached.add(event.role)
    return [StartPump()]


def load(machine: DestinationMachine, state: StateMessage) -> list[Command]:
    """Restore the guest."""
    machine.comparable = state.boot_id == machine.boot_id
    return [Load(state.guest, state.stopped_at, state.boot_id)]


def loaded(_machine: DestinationMachine, _event: Event) -> list[Command]:
    """Say that Run may come."""
    return [Send(Loaded())]


def start_guest(machine: DestinationMachine, _event: Event) -> list[Command]:
    """Run the guest: the right to is here now."""
    return [StartGuest(), *([WatchData()] if machine.recoverable else [])]


def running(machine: DestinationMachine, event: GuestRunning) -> list[Command]:
    """Tell when the guest made its first step."""
    machine.first_instruction_at = event.first_instruction_at if machine.comparable else 0.0
    return [Send(Running(machine.first_instruction_at))]


def progress(_machine: DestinationMachine, event: Progressed) -> list[Command]:
    """Tell how far it is."""
    return [Send(Progress(event.placed_pages, event.total_pages, event.faults, event.latencies))]


def resident_early(machine: DestinationMachine, _event: Event) -> list[Command]:
    """Take note that every page is here before Run is."""
    # Run and memory travel on connections of their own: a small guest may be here before Run is.
    machine.resident = True
    return []


def start_resident(_machine: DestinationMachine, _event: Event) -> list[Command]:
    """Start a guest that is whole already."""
    return [StartGuest(), MakeReport()]


def sum_up(_machine: DestinationMachine, _event: Event) -> list[Command]:
    """Every page is here: make the report."""
    return [MakeReport()]


def all_placed(machine: DestinationMachine, event: AllResident | WorkFailed) -> list[Command]:
    """Tell the source that its copy is needed no more."""
    # The data connections stay open until Released: closed earlier, the source would take their end for a loss. It
    # would do so for want of this message, too, so a report that cannot be made does not hold it back.
    message = AllPlaced(event.report, event.latencies) if isinstance(event, AllResident) else AllPlaced({})
    machine.all_placed = message
    return [Settle(), Send(message)]


def complete(machine: DestinationMachine, _event: Event) -> list[Command]:
    """End well."""
    text = "every page is here, the guest runs on without the source"
    settle: list[Command] = [Settle()] if machine.step is Step.SETTLING else []
    return [*settle, StopPump(), CloseLinks(), Finish(State.COMPLETED, Owner.DESTINATION, text, 0)]


def released(machine: DestinationMachine, event: Event) -> list[Command]:
    """End well, with a source that knows it."""
    machine.acknowledged = True
    return complete(machine, event)


def stay(_machine: DestinationMachine, _event: Event) -> list[Command]:
    """Do nothing."""
    return []


# --- the ways out before Run: everything is thrown away ---------------------------------------------------


def _away(subject: Event | Message, state: State) -> list[Command]:
    """Tell the source if it is still there and does not know yet, forget the guest."""
    goodbye: list[Command] = []
    status = 7 if state is State.CANCELLED else 4
    match subject:
        case Cancel(text=text):
            text = f"cancelled by the source: {text}"
        case Refuse(text=text):
            text = f"the source refused: {text}"
        case ControlLost(text=text) | NotSent(text=text):
            pass
        case WorkFailed(code=code, text=text, exit_status=status):
            goodbye = [Send(Refuse(code, text))]
        case Broken(text=text):
            text = f"the source broke the protocol: {text}"
            goodbye = [Send(Refuse("protocol", text))]
        case CancelAsked(text=text) | PumpFailed(text=text) | PumpBroken(text=text):
            goodbye = [Send(Cancel(text))]
        case Resident():
            text = "every page came before the guest's state"
            goodbye = [Send(Cancel(text))]
        case _:
            text = "the source did not go on in time"
            goodbye = [Send(Cancel(text))]
    return [*goodbye, Discard(), CloseLinks(), Finish(state, Owner.SOURCE, text, status)]


def fail(_machine: DestinationMachine, subject: Event | Message) -> list[Command]:
    """Throw everything away: it cannot be."""
    return _away(subject, State.FAILED)


def cancel(_machine: DestinationMachine, subject: Event | Message) -> list[Command]:
    """Throw everything away: somebody wants no migration."""
    return _away(subject, State.CANCELLED)


def ask_to_cancel(machine: DestinationMachine, event: Event) -> list[Command]:
    """Ask the source, for Run may be on its way."""
    if isinstance(event, Elapsed):
        machine.deadline = None  # asked once; from here the connection itself tells
    text = event.text if isinstance(event, CancelAsked) else "Run did not come in time"
    return [Send(Cancel(text))]
