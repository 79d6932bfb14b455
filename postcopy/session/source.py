"""The source's side of a migration: owns the guest until it sends Run.

In come the user's wish, the destination's messages and what this host's own work led to; out go commands. The point of
no return is the *sending* of Run, not its acknowledgement: once the message has left this process nobody here can
know whether the destination acted on it, and two running guests would both write to disks and networks, which
nothing mends. So after it the source never resumes the guest by itself, and every way out before it resumes the guest
first of all. Two cases are let through: the connection was known to be closed when Run was to be sent (NotSent), so
that no destination can ever see it; and the destination itself says, when the source comes back after a pause, that Run
never came and what it had of the guest was thrown away. What happens after Run is in source_recovery.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

from postcopy.errors import ProtocolError
from postcopy.limits import OLD_SILENCE_SECONDS, RECONNECT_SECONDS, SILENCE_SECONDS
from postcopy.session import source_recovery as recovery
from postcopy.session.commands import (
    CloseLinks,
    Command,
    Connect,
    DialData,
    Finish,
    HandOver,
    KeepRecord,
    Note,
    ReleaseMemory,
    ResumeGuest,
    Send,
    StartPump,
    StartPush,
    StopGuest,
    StopPump,
    WatchData,
)
from postcopy.session.events import (
    Broken,
    CancelAsked,
    ControlLost,
    DataConnected,
    Elapsed,
    Event,
    GuestStopped,
    NotSent,
    PushAsked,
    Received,
    Started,
    WorkFailed,
)
from postcopy.session.machine import PausingMachine
from postcopy.session.source_steps import BEFORE_RUN, PATIENCE, PAUSES, STATES, Step
from postcopy.session.states import SWITCHED, Owner, State
from postcopy.session.timeline import Timeline
from postcopy.wire.latencies import NOTHING
from postcopy.wire.messages import (
    GONE,
    UNRUN,
    AllPlaced,
    Cancel,
    Hello,
    LayoutOffer,
    Message,
    Progress,
    Ready,
    Refuse,
    Released,
    Run,
    Running,
    Welcome,
)
from postcopy.wire.messages import State as StateMessage
from postcopy.wire.version import HANDED_OVER_SINCE, LATENCIES_SINCE, RECOVERY_SINCE


class SourceMachine(PausingMachine[Step]):
    """One migration as its source sees it.

    `hello` and `offer` are sent as they are. `push`: pages are to be sent in the background, too; what was begun is
    wanted no more, until it is asked for again. `give_up_seconds` is how long a pause may last, None: for ever.
    """

    states: ClassVar = STATES
    patience: ClassVar = PATIENCE
    active: ClassVar = Step.ACTIVE
    pauses: ClassVar = PAUSES
    severs: ClassVar = ("ControlLost", "Broken", "PumpBroken", "Refuse", "Elapsed")
    shows_latencies: ClassVar = True

    def __init__(
        self, hello: Hello, offer: LayoutOffer, *, push: bool = True, give_up_seconds: float | None = None
    ) -> None:
        super().__init__(Step.IDLE, give_up_seconds)
        self.hello = hello
        self.offer = offer
        self.push = push
        self.pushing = False
        self.token = b""  # of the data connections
        self.first_token = b""  # of the migration
        self.timeline = Timeline()
        self.pages = sum(region.size // region.page_size for region in offer.regions)
        self.placed_pages = 0
        self.report: dict[str, Any] = {}
        self.latencies = NOTHING  # at the destination
        self.latencies_at: float | None = None  # when it told of them; None: it has not
        self._limit_at: float | None = None

    @property
    def recoverable(self) -> bool:
        """Whether it outlives its connections: both sides know how, and pages travel at all."""
        return self.version >= RECOVERY_SINCE and not self.offer.handed_over

    def handle(self, event: Event) -> list[Command]:
        """Note when the destination was heard last, and that it stays; then as any machine."""
        if isinstance(event, Received | DataConnected):
            self.heard_at = event.now
            if isinstance(event, Received) and isinstance(event.message, Progress):
                self.attempts = 0
        return super().handle(event)

    def _late_key(self, event: Event) -> str:
        match event:
            case Received(message=Refuse(code=code)) if self.state in SWITCHED:
                return {GONE: "RefuseGone", UNRUN: "RefuseUnrun"}.get(code, "Refuse")
            case _:
                return ""

    def _key(self, event: Event) -> str:
        """Tell limits of the user's from a step's, a Run that never left, and memory that is handed over."""
        if isinstance(event, Elapsed) and self._limit_at is not None and event.now >= self._limit_at:
            return "LimitElapsed"
        if isinstance(event, NotSent) and isinstance(event.message, Run):
            return "RunNotSent"
        if self.offer.handed_over and isinstance(event, Received):
            match event.message:
                case Welcome(version=version) if version < HANDED_OVER_SINCE:
                    return "WelcomeTooOld"
                case Welcome() | Ready():
                    return super()._key(event) + "HandedOver"
        return super()._key(event)

    def _deadline(self, now: float, entered: bool) -> float | None:
        if self.step is Step.ACTIVE:
            heard = now if entered else max(self.heard_at, self.timeline.run_sent)
            return heard + (SILENCE_SECONDS if self.recoverable else OLD_SILENCE_SECONDS)
        deadline = super()._deadline(now, entered or (self.step is Step.REJOINING and self.heard_at == now))
        if self.step is Step.PAUSED:
            wait = RECONNECT_SECONDS[min(self.attempts, len(RECONNECT_SECONDS) - 1)]
            deadline = None if self.held else now + wait if entered else deadline
        limits = [limit for limit in (deadline, self._limit_at, self.give_up_at) if limit is not None]
        return min(limits, default=None) if deadline is not None or self.step is Step.PAUSED else None

    def why(self, subject: Event | Message) -> str:
        """Say what happened, for a person."""
        return _why(self, subject)[0]

    def begin_push(self) -> list[Command]:
        """Begin the push where it is wanted, once."""
        return _begin_push(self)

    def give_up(self, failure: WorkFailed) -> list[Command]:
        """Before Run the guest goes on here; after it nobody knows where it runs."""
        if self.state in SWITCHED:
            commands, self.step = recovery.lose(self, failure), Step.LOST
        else:
            commands, self.step = _fail(self, failure), Step.FAILED
        self.deadline = None
        return commands


# --- the way forward, in the order in which it is gone ----------------------------------------------------


def _connect(machine: SourceMachine, event: Started) -> list[Command]:
    if event.limit_seconds is not None:
        machine._limit_at = machine.now + event.limit_seconds  # noqa: SLF001 - the machine's own action
    machine.timeline.started = machine.now
    return [Connect()]


def _greet(machine: SourceMachine, _event: Event) -> list[Command]:
    return [Send(machine.hello)]


def accept(machine: SourceMachine, welcome: Welcome) -> list[Command]:
    """Go on in the version that the destination chose, with the offer as it is."""
    low, high = machine.hello.versions
    if not low <= welcome.version <= high:
        spoken = f"this agent speaks {low} to {high}"
        raise ProtocolError(f"the destination chose version {welcome.version}: {spoken}")
    machine.version = welcome.version
    machine.migration_id, machine.token = welcome.migration_id, welcome.token
    machine.first_token = welcome.token
    return [Send(machine.offer)]


def _offer(machine: SourceMachine, welcome: Welcome) -> list[Command]:
    if welcome.pieces:
        raise ProtocolError("the destination asks for pieces of memory, and did not dial for them")
    return accept(machine, welcome)


def _hand_over(machine: SourceMachine, welcome: Welcome) -> list[Command]:
    return [*_offer(machine, welcome), HandOver(machine.migration_id, machine.token)]


def _dial_data(machine: SourceMachine, _event: Event) -> list[Command]:
    return [DialData(machine.migration_id, machine.token)]


def _stop_guest(_machine: SourceMachine, _event: Event) -> list[Command]:
    # the pump runs before the guest stands still: its start is no part of the downtime
    return [StartPump(), StopGuest()]


def _stop_guest_alone(_machine: SourceMachine, _event: Event) -> list[Command]:
    return [StopGuest()]


def _send_state(machine: SourceMachine, event: GuestStopped) -> list[Command]:
    machine.timeline.stopped = machine.now
    machine.timeline.stopped_at = event.stopped_at
    return [Send(StateMessage(guest=event.state, stopped_at=event.stopped_at, boot_id=event.boot_id))]


def _run(machine: SourceMachine, _loaded: Message) -> list[Command]:
    machine.timeline.run_sent = machine.now
    machine._limit_at = None  # noqa: SLF001 - a limit on the switchover has no say after it
    # what must not be lost with this agent is safe before the guest is anybody else's
    return [KeepRecord(), Send(Run()), WatchData()] if machine.recoverable else [Send(Run())]


def _begin_push(machine: SourceMachine) -> list[Command]:
    """Begin the push, once: with Running, or else with the first Progress.

    Up to Running the link and the CPUs are for the page of the guest's first step alone, since the downtime ends with
    it. A guest that makes no step must not hold up its own memory: Progress comes in any case.
    """
    pages_travel = not machine.offer.handed_over
    wanted, machine.push = pages_travel and machine.push and not machine.pushing, False
    machine.pushing = machine.pushing or wanted
    return [StartPush()] if wanted else []


def _push(machine: SourceMachine, _event: PushAsked) -> list[Command]:
    machine.push = True
    return _begin_push(machine)


def _note_running(machine: SourceMachine, message: Running) -> list[Command]:
    if machine.timeline.running:
        return []  # said once more after a pause
    machine.timeline.running = machine.now
    machine.timeline.first_instruction_at = message.first_instruction_at
    return [Note(f"the guest runs at the destination, downtime {machine.timeline.downtime * 1e3:.2f} ms")]


def _running(machine: SourceMachine, message: Running) -> list[Command]:
    return _begin_push(machine) + _note_running(machine, message)


def _note_progress(machine: SourceMachine, message: Progress) -> list[Command]:
    machine.placed_pages = min(message.placed_pages, machine.pages)
    _note_latencies(machine, message)
    return []


def _note_latencies(machine: SourceMachine, message: Progress | AllPlaced) -> None:
    # One that could not sum up says nothing: what was known before is the latest then.
    if machine.shows_latencies and machine.version >= LATENCIES_SINCE and message.latencies != NOTHING:
        machine.latencies, machine.latencies_at = message.latencies, machine.now


def _progress(machine: SourceMachine, message: Progress) -> list[Command]:
    return _note_progress(machine, message) + _begin_push(machine)


_ALL_THERE = "every page is at the destination"


def _release(machine: SourceMachine, message: AllPlaced) -> list[Command]:
    machine.timeline.all_placed = machine.now
    machine.report = message.report
    _note_latencies(machine, message)
    machine.placed_pages = machine.pages
    pages = message.report.get("pages")
    left = pages.get("left", 0) if isinstance(pages, dict) else 0
    text = f"the destination needs nothing more: {left} pages were never asked for" if left else _ALL_THERE
    end = Finish(State.COMPLETED, Owner.DESTINATION, text, 0)
    return [Send(Released()), StopPump(), ReleaseMemory(), CloseLinks(), end]


def _stay(_machine: SourceMachine, _event: Event) -> list[Command]:
    return []


# --- the ways out before Run: the guest first -------------------------------------------------------------


def _why(machine: SourceMachine, subject: Event | Message) -> tuple[str, int]:
    """Say why it ends, for a person, and the exit status that goes with it."""
    status = 4
    match subject:
        case Refuse(text=text):
            text = f"the destination refused: {text}"
        case Cancel(text=text):
            text, status = f"cancelled by the destination: {text}", 7
        case CancelAsked(text=text):
            status = 7
        case WorkFailed(text=text, exit_status=status):
            pass
        case Welcome(version=version):
            spoken = f"the destination speaks version {version} of the protocol"
            text = f"{spoken}, and memory is handed over from version {HANDED_OVER_SINCE} on"
        case Broken(text=text):
            text = f"the destination broke the protocol: {text}"
        case Elapsed() if machine.key(subject) == "LimitElapsed":
            text, status = "the time limit passed before the switchover", 7
        case Elapsed() if machine.step is Step.ACTIVE:
            text = "nothing was heard from the destination any more"
        case Elapsed():
            text = f"the destination did not answer in time ({machine.step})"
        case _:
            text = str(getattr(subject, "text", type(subject).__name__))
    return text, status


def _goodbye(machine: SourceMachine, subject: Event | Message, text: str) -> list[Command]:
    """Tell the destination, where it is there and does not know yet."""
    if machine.step in {Step.IDLE, Step.DIALLING} or isinstance(subject, Refuse | Cancel):
        return []
    if isinstance(subject, ControlLost | NotSent):
        return []
    return [Send(Refuse("protocol", text)) if isinstance(subject, Broken) else Send(Cancel(text))]


def _back(machine: SourceMachine, subject: Event | Message, state: State) -> list[Command]:
    """Let the guest run on here, say goodbye, give up."""
    text, status = _why(machine, subject)
    stopped = {Step.STOPPING, Step.LOADING, Step.ACTIVE, *PAUSES}
    resume = [ResumeGuest()] if machine.step in stopped else []
    running = machine.step in {Step.HANDING, Step.ATTACHING, *stopped}
    pump = [StopPump()] if running else []
    end = Finish(state, Owner.SOURCE, text, status)
    return [*resume, *_goodbye(machine, subject, text), *pump, CloseLinks(), end]


def _fail(machine: SourceMachine, subject: Event | Message) -> list[Command]:
    return _back(machine, subject, State.FAILED)


def _cancel(machine: SourceMachine, subject: Event | Message) -> list[Command]:
    return _back(machine, subject, State.CANCELLED)


_FAILURES = (*SourceMachine.severs, "NotSent", "WorkFailed", "PumpFailed")
_CANCELS = ("Cancel", "CancelAsked", "LimitElapsed")

SourceMachine.table = {
    (Step.IDLE, "Started"): (Step.DIALLING, _connect),
    (Step.IDLE, "CancelAsked"): (Step.CANCELLED, _cancel),
    (Step.DIALLING, "Connected"): (Step.GREETING, _greet),
    (Step.GREETING, "Welcome"): (Step.OFFERING, _offer),
    (Step.GREETING, "WelcomeHandedOver"): (Step.HANDING, _hand_over),
    (Step.GREETING, "WelcomeTooOld"): (Step.FAILED, _fail),
    (Step.HANDING, "FilesHanded"): (Step.OFFERING, _stay),
    (Step.OFFERING, "ReadyHandedOver"): (Step.STOPPING, _stop_guest_alone),
    (Step.OFFERING, "Ready"): (Step.ATTACHING, _dial_data),
    (Step.ATTACHING, "DataConnected"): (Step.STOPPING, _stop_guest),
    (Step.STOPPING, "GuestStopped"): (Step.LOADING, _send_state),
    (Step.LOADING, "Loaded"): (Step.ACTIVE, _run),
    (Step.ACTIVE, "Running"): (Step.ACTIVE, _running),
    (Step.ACTIVE, "Progress"): (Step.ACTIVE, _progress),
    (Step.ACTIVE, "AllPlaced"): (Step.COMPLETED, _release),
    **{(step, key): (Step.FAILED, _fail) for step in BEFORE_RUN for key in _FAILURES},
    **{(step, key): (Step.CANCELLED, _cancel) for step in BEFORE_RUN for key in _CANCELS},
    # a wish until the guest has left: its memory may not be read while it still runs here
    **{(step, "PushAsked"): (step, recovery.wish_push) for step in (Step.IDLE, *BEFORE_RUN)},
    (Step.ACTIVE, "PushAsked"): (Step.ACTIVE, _push),
    (Step.ACTIVE, "RunNotSent"): (Step.FAILED, _fail),
    # after it, until the last page
    **recovery.ROWS,
    # the guest never ran there and never will: the source has everything of it
    **{(step, "RefuseUnrun"): (Step.FAILED, _fail) for step in (Step.ACTIVE, Step.REJOINING, Step.REATTACHING)},
    # the push begins when both data connections stand: begun earlier, it would be forgotten with an attempt that fails
    **{(step, "Running"): (step, _note_running) for step in (Step.REJOINING, Step.REATTACHING)},
    **{(step, "Progress"): (step, _note_progress) for step in (Step.REJOINING, Step.REATTACHING)},
    **{(step, "AllPlaced"): (Step.COMPLETED, _release) for step in (Step.REJOINING, Step.REATTACHING)},
}
