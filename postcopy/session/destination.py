"""The destination's side of a migration: owns the guest from the receipt of Run, and never before.

In come the source's messages, data connections that proved themselves and what this host's own work led to; out go
commands. Until Run is here everything can be thrown away, with one exception: after Loaded was sent, Run may already be
on its way, so then nobody's change of mind and no clock makes the destination walk off; it asks the source to cancel
and goes on listening until either Run or the end of the connection arrives. It leaves by itself only where it could not
run the guest any more: its pump or its own work has failed, or the source broke the protocol. After Run pages that are
still at the source are part of the guest: see destination_recovery.py. With the last page placed nothing the source
does can harm the guest any more. Memory that is handed over is here as soon as its files are mapped, so that with Run
the guest is whole.
"""

from __future__ import annotations

from typing import ClassVar

from postcopy.limits import ANSWER_SECONDS, OWED_SECONDS, PROGRESS_SECONDS, SILENCE_SECONDS
from postcopy.session import destination_actions as actions
from postcopy.session import destination_recovery as recovery
from postcopy.session.commands import Command
from postcopy.session.destination_steps import PATIENCE, PAUSES, STATES, Step
from postcopy.session.events import (
    DataAttached,
    Event,
    Prepared,
    Progressed,
    PumpFailed,
    Received,
    Rejoined,
    WorkFailed,
)
from postcopy.session.machine import PausingMachine
from postcopy.session.states import ENDED, SWITCHED, State
from postcopy.wire.messages import ALL, GONE, UNKNOWN, UNRUN, AllPlaced, Hello, LayoutOffer, Piece, Refuse, Run
from postcopy.wire.version import LATENCIES_SINCE, RECOVERY_SINCE, common

ROLES = frozenset({"urgent", "push"})


class DestinationMachine(PausingMachine[Step]):
    """One migration as its destination sees it.

    `identity` is (migration id, token), fresh random bytes for every migration; `versions` are the lowest
    and the highest spoken; `give_up_seconds` is how long a pause may last, None: for ever. `pieces` and
    `pages` are what it asks for where it fetches. `recovers`: whoever performs it lets a source come back.
    """

    states: ClassVar = STATES
    patience: ClassVar = PATIENCE
    lingering: ClassVar = frozenset({Step.SETTLING, Step.RELEASING})
    active: ClassVar = Step.ACTIVE
    pauses: ClassVar = PAUSES
    severs: ClassVar = ("ControlLost", "Broken", "PumpBroken", "Refuse", "Elapsed", "Starved")

    def __init__(
        self,
        versions: tuple[int, int],
        identity: tuple[bytes, bytes],
        software: str,
        boot_id: str,
        now: float,
        *,
        pieces: tuple[Piece, ...] = (),
        pages: str = ALL,
        give_up_seconds: float | None = None,
        recovers: bool = True,
    ) -> None:
        super().__init__(Step.IDLE, give_up_seconds)
        self.pieces, self.pages = pieces, pages
        self.begin(now)
        self.versions = versions
        self.migration_id, self.token = identity
        self.first_token = self.token  # the token of the data connections is another one after a pause
        self.software = software
        self.boot_id = boot_id
        self.attached: set[str] = set()
        self.comparable = False
        self.probed = False  # it was only ever a question: no migration began
        self.resident = False  # every page is here before Run has been read
        self.offer: LayoutOffer | None = None  # of memory that is handed over
        self.recovers = recovers
        self.acknowledged = False  # the source has said that it let go of its memory
        self.all_placed: AllPlaced | None = None  # once it is to be said
        self.first_instruction_at: float | None = None
        self._fed = (-1, 0)  # bytes, and tries to place them
        self._unfed = 0  # looks in a row

    @property
    def tells_latencies(self) -> bool:
        """Whether anybody hears of them now."""
        return self.state is State.POSTCOPY_ACTIVE and self.version >= LATENCIES_SINCE

    def begin(self, now: float) -> None:
        """Wait for the source's first word from `now` on; again, where it could not be heard before."""
        self.deadline = now + ANSWER_SECONDS

    def wait_from(self, now: float) -> None:
        """Give the source its time from `now` on: what this side had to do first took time of its own."""
        self.deadline = self._deadline(now, entered=True)

    def _late_key(self, event: Event) -> str:
        """Tell a refusal for good, and a source that comes back while it may not."""
        match event:
            case Received(message=Refuse(code=code)) if code == GONE and self.state in SWITCHED:
                return "RefuseGone"
            case PumpFailed() if self.offer is not None and self.step is Step.LOADED:
                return "PumpFailedHandedOver"
            case Rejoined() if self.held and self.step is Step.PAUSED:
                return "RejoinedHeld"
            case Rejoined() if self.resident and self.step is Step.LOADED:
                return "RejoinedResident"
            case _:
                return ""

    def _key(self, event: Event) -> str:
        """Tell a Hello in no common version, memory that is handed over, which data connection it is, a mute source."""
        match event:
            case Received(message=Hello(versions=offered)) if not common(offered, self.versions):
                return "HelloUnspoken"
            case Received(message=LayoutOffer(handed_over=True)):
                return "LayoutOfferHandedOver"
            case DataAttached(role=role, token=token):
                last = "LastDataAttached" if self.attached | {role} == ROLES else "DataAttached"
                return last if token == self.token else "DataAttachedBefore"
            case Progressed() if self._starved(event):
                return "Starved"
            case Prepared() | Received(message=Run()) if self.resident:
                return super()._key(event) + "Resident"
            case _:
                return super()._key(event)

    @property
    def recoverable(self) -> bool:
        """Whether it outlives its connections: both sides know how, and pages travel at all."""
        return self.recovers and self.version >= RECOVERY_SINCE and self.offer is None

    @property
    def unheard(self) -> bool:
        """Whether all is here and the source, which may not know, keeps its pages and comes back to ask."""
        return self.state is State.COMPLETED and self.recoverable and not self.acknowledged

    def handle(self, event: Event) -> list[Command]:
        """Note when the source was heard last; then as any machine."""
        if isinstance(event, Received | Rejoined | DataAttached):
            self.heard_at = event.now
        return super().handle(event)

    def _deadline(self, now: float, entered: bool) -> float | None:
        if self.step is Step.ACTIVE:
            heard = now if entered else self.heard_at
            return heard + SILENCE_SECONDS if self.recoverable else None
        deadline = super()._deadline(now, entered or (self.step is Step.RECOVERING and self.heard_at == now))
        limits = [limit for limit in (deadline, self.give_up_at) if limit is not None]
        return min(limits, default=None)

    @property
    def wants_data(self) -> bool:
        """Whether it waits for data connections."""
        return self.step in {Step.WAITING, Step.RECOVERING}

    def refusal_of_return(self) -> Refuse | None:
        """Say what a source that comes back, proven, is told; None: it is let in, or told that all is done."""
        if self.state in SWITCHED or self.state is State.COMPLETED or self.step is Step.LOADED:
            return None
        if self.state is State.LOST:
            return Refuse(GONE, "the guest was given up here")
        if self.state in ENDED and not self.probed:
            return Refuse(UNRUN, "RUN never came here, and what had come was thrown away")
        return Refuse(UNKNOWN, "this migration has not come so far that it could be resumed")

    def _starved(self, event: Progressed) -> bool:
        """Whether it owes pages and sent no byte for too many looks (not seconds: this side may have been stopped).

        While this kernel puts off the placing of what it sent, for which the pump has a patience of its own, it is not
        the source that is waited for.
        """
        # what is waited for during a pause is owed by nobody: it is asked for when the source is back
        owed = event.owed > 0 and self.step is Step.ACTIVE
        seen = (event.received_bytes, event.retries)
        fed = not owed or seen != self._fed
        self._fed, self._unfed = seen, 0 if fed else self._unfed + 1
        return self._unfed * PROGRESS_SECONDS > OWED_SECONDS

    def give_up(self, failure: WorkFailed) -> list[Command]:
        """Before Run the guest is the source's; after it the pages decide whether it is whole."""
        if self.step in {Step.SETTLING, Step.RELEASING}:
            commands, self.step = actions.complete(self, failure), Step.COMPLETED
        elif self.state in SWITCHED:
            commands, self.step = recovery.lose(self, failure), Step.LOST
        else:
            commands, self.step = actions.fail(self, failure), Step.FAILED
        self.deadline = None
        return commands


_EARLY = (Step.GREETED, Step.PROBING, Step.TAKING, Step.PREPARING, Step.WAITING, Step.ATTACHED, Step.LOADING)
_FAILURES = ("ControlLost", "NotSent", "Broken", "WorkFailed", "PumpFailed", "PumpBroken", "Refuse", "Elapsed")
_GOODBYES = ("ControlLost", "Broken", "Refuse", "Elapsed")
_LATE = ("NotSent", "PumpFailed", "Starved", "Resident")
_CANCELS = ("Cancel", "CancelAsked")

DestinationMachine.table = {
    (Step.IDLE, "Hello"): (Step.GREETED, actions.welcome),
    (Step.IDLE, "HelloUnspoken"): (Step.FAILED, actions.refuse_version),
    (Step.GREETED, "LayoutOffer"): (Step.PREPARING, actions.prepare),
    (Step.GREETED, "LayoutOfferHandedOver"): (Step.TAKING, actions.take_files),
    (Step.TAKING, "FilesTaken"): (Step.PREPARING, actions.prepare_files),
    (Step.PREPARING, "PreparedResident"): (Step.ATTACHED, actions.ready_resident),
    (Step.GREETED, "Probe"): (Step.PROBING, actions.try_out),
    (Step.PROBING, "TriedOut"): (Step.PROBED, actions.answer),
    (Step.PREPARING, "Prepared"): (Step.WAITING, actions.ready),
    (Step.WAITING, "DataAttached"): (Step.WAITING, actions.attach),
    (Step.WAITING, "LastDataAttached"): (Step.ATTACHED, actions.attach_last),
    (Step.ATTACHED, "State"): (Step.LOADING, actions.load),
    (Step.LOADING, "GuestLoaded"): (Step.LOADED, actions.loaded),
    (Step.LOADED, "Run"): (Step.ACTIVE, actions.start_guest),
    (Step.ACTIVE, "GuestRunning"): (Step.ACTIVE, actions.running),
    (Step.ACTIVE, "Progressed"): (Step.ACTIVE, actions.progress),
    (Step.ACTIVE, "Resident"): (Step.SETTLING, actions.sum_up),
    (Step.SETTLING, "GuestRunning"): (Step.SETTLING, actions.running),
    (Step.SETTLING, "Progressed"): (Step.SETTLING, actions.progress),
    (Step.SETTLING, "AllResident"): (Step.RELEASING, actions.all_placed),
    (Step.SETTLING, "WorkFailed"): (Step.RELEASING, actions.all_placed),
    (Step.RELEASING, "GuestRunning"): (Step.RELEASING, actions.running),
    (Step.RELEASING, "Released"): (Step.COMPLETED, actions.released),
    **{(step, key): (Step.FAILED, actions.fail) for step in (Step.IDLE, *_EARLY) for key in _FAILURES},
    **{(step, key): (Step.CANCELLED, actions.cancel) for step in (Step.IDLE, *_EARLY) for key in _CANCELS},
    **{(step, "Resident"): (Step.FAILED, actions.fail) for step in (Step.ATTACHED, Step.LOADING)},
    # from here Run may be on its way
    (Step.LOADED, "Resident"): (Step.LOADED, actions.resident_early),
    (Step.LOADED, "RunResident"): (Step.SETTLING, actions.start_resident),
    **{(Step.LOADED, key): (Step.LOADED, actions.ask_to_cancel) for key in ("CancelAsked", "Elapsed")},
    **{(Step.LOADED, key): (Step.FAILED, actions.fail) for key in _FAILURES if key != "Elapsed"},
    (Step.LOADED, "PumpFailedHandedOver"): (Step.LOADED, actions.stay),
    (Step.LOADED, "Cancel"): (Step.CANCELLED, actions.cancel),
    # the guest runs here
    **recovery.ROWS,
    # every page is here: whatever the source does now, the guest does not need it
    **{(Step.SETTLING, key): (Step.COMPLETED, actions.complete) for key in _GOODBYES},
    **{(Step.RELEASING, key): (Step.COMPLETED, actions.complete) for key in _GOODBYES},
    **{(step, key): (step, actions.stay) for step in (Step.SETTLING, Step.RELEASING) for key in _LATE},
    **{(Step.RELEASING, key): (Step.RELEASING, actions.stay) for key in ("WorkFailed", "Progressed", "AllResident")},
    **{(step, "CancelAsked"): (step, recovery.mine) for step in (Step.SETTLING, Step.RELEASING)},
}
