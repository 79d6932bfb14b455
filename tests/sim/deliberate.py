"""Deliberate faults: each is a mistake that somebody could make, put into the code for a while.

Most are put into the production code of the pure rooms; the pump being a model here, mistakes of its kind are put into
the model. Each has a rule that is meant for it; others may find it earlier.
"""

from collections.abc import Callable
from dataclasses import dataclass

from postcopy.pages import Bitmap, Ledger, PageState
from postcopy.plan.push import PushPlan
from postcopy.session import commands as does
from postcopy.session import destination_actions, source, source_recovery
from postcopy.session.destination import DestinationMachine
from postcopy.session.destination_steps import Step as There
from postcopy.session.source import SourceMachine
from postcopy.session.source_steps import Step as Here
from postcopy.session.states import SWITCHED
from postcopy.wire import frame
from postcopy.wire.control import ControlDecoder, Ready, Refuse, Run

from .destination import DestinationAgent
from .destination_pump import DestinationPump, Receiver

Patch = Callable[[object, str, object], None]


@dataclass(frozen=True)
class Fault:
    """`put(patch)` puts it in, by `patch(owner, name, value)`, which is undone afterwards; `rule` is to find it."""

    name: str
    rule: str
    put: Callable[[Patch], None]


FAULTS = []


def fault(name, rule, into=FAULTS):
    """Declare a fault; the function takes `patch`."""

    def declare(put):
        into.append(Fault(name, rule, put))
        return put

    return declare


def row(patch, machine, key, step, action):
    """Have a machine's table say something else."""
    patch(machine, "table", {**machine.table, key: (step, action)})


# --- pages ------------------------------------------------------------------------------------------------


@fault("claim-dropped", "claims-held")
def _(patch):
    """A page that somebody is writing already may be claimed once more."""
    claim = Ledger.claim
    patch(Ledger, "claim", lambda self, page: claim(self, page) or self[page] is PageState.WATCHED)


@fault("late-push-not-dropped", "placed-once")
def _(patch):
    """A copy that comes second is written over the guest's page."""
    claim = Ledger.claim

    def careless(self, page):
        won = claim(self, page)
        if not won and self[page] is PageState.PLACED:
            self._states[page] = PageState.PLACING
            return True
        return won

    patch(Ledger, "claim", careless)


@fault("claim-not-given-up", "claims-held")
def _(patch):
    """What came of a page in part is forgotten, and its claim is kept."""
    patch(Ledger, "release", lambda _self, _page: True)


@fault("zero-without-waking", "asked")
def _(patch):
    """A page that somebody waits for is noted as zeros, and nobody is woken."""

    def careless(self, page):
        if self[page] in {PageState.ABSENT, PageState.REQUESTED}:
            self._states[page] = PageState.ZERO
            return True
        return False

    patch(Ledger, "zero", careless)


@fault("balloon-forgotten", "right-bytes")
def _(patch):
    """A page that the guest gives back is fetched all the same."""
    patch(Ledger, "discard", lambda _self, _page: False)


@fault("bitmap-off-by-one", "told")
def _(patch):
    """The bits of what is here are one page off."""
    of_states = Bitmap.of_states.__func__

    def shifted(cls, states, *wanted):
        return of_states(cls, bytes(states)[-1:] + bytes(states)[:-1], *wanted)

    patch(Bitmap, "of_states", classmethod(shifted))


@fault("have-too-long", "told")
def _(patch):
    """Each run of pages that are here is told one page longer."""
    to_bytes = Bitmap.to_bytes

    def longer(self):
        grown = Bitmap(self.length)
        for begin, stop in self.runs():
            for page in range(begin, min(stop + 1, self.length)):
                grown.set(page)
        return to_bytes(grown)

    patch(Bitmap, "to_bytes", longer)


# --- plan -------------------------------------------------------------------------------------------------


@fault("plan-forgets-a-page", "push-whole")
def _(patch):
    """The page before a demanded one falls out of the plan."""
    following = PushPlan._next_back

    def forgetful(self, demand):
        extent = following(self, demand)
        return following(self, demand) if extent is not None else None

    patch(PushPlan, "_next_back", forgetful)


@fault("plan-drops-the-last-extent", "push-whole")
def _(patch):
    """The last extent of the data is never returned."""
    following = PushPlan.next

    def short(self, room):
        extents = following(self, room)
        return extents[:-1] if extents and self.done else extents

    patch(PushPlan, "next", short)


@fault("zero-extent-too-long", "right-bytes")
def _(patch):
    """A hole is one page longer than it is."""
    following = PushPlan._next_hole

    def longer(self):
        extent = following(self)
        if extent is None:
            return None
        region = self._layout.regions[extent.region]
        length = min(extent.length + region.page_size, region.size - extent.offset)
        return extent._replace(length=length)

    patch(PushPlan, "_next_hole", longer)


# --- wire -------------------------------------------------------------------------------------------------


@fault("decoder-loses-a-byte", "completes")
def _(patch):
    """A message that comes in two pieces loses a byte where it was cut."""
    following = ControlDecoder._next_payload

    def careless(self):
        payload = following(self)
        if payload is None and len(self._buffer) > 4:
            del self._buffer[-1:]
        return payload

    patch(ControlDecoder, "_next_payload", careless)


@fault("frame-offset-off-by-one-page", "right-bytes")
def _(patch):
    """A header is packed with the offset of the page behind."""
    pack = frame.pack

    def shifted(header):
        moved = header.type == frame.FrameType.PAGES and header.offset >= header.length
        return pack(header._replace(offset=header.offset - header.length) if moved else header)

    patch(frame, "pack", shifted)


# --- session ----------------------------------------------------------------------------------------------


@fault("acknowledged-too-early", "acknowledged")
def _(patch):
    """The destination takes a guest that runs for one that is whole."""
    row(patch, DestinationMachine, (There.ACTIVE, "Progressed"), There.SETTLING, destination_actions.sum_up)


@fault("released-too-early", "kept")
def _(patch):
    """The source lets go of its memory once it hears of progress."""

    def release(machine, _message):
        return [does.StopPump(), does.ReleaseMemory()]

    row(patch, SourceMachine, (Here.ACTIVE, "Progress"), Here.ACTIVE, release)


@fault("source-resumes-after-run", "one-owner")
def _(patch):
    """The source takes a lost connection behind Run for one before it."""
    row(patch, SourceMachine, (Here.ACTIVE, "ControlLost"), Here.FAILED, source._fail)


@fault("run-sent-twice", "run-once")
def _(patch):
    """Run is sent once more when the source comes back."""
    rejoin = source_recovery.rejoin

    def again(machine, event):
        return [*rejoin(machine, event), does.Send(Run())]

    row(patch, SourceMachine, (Here.REDIALLING, "Connected"), Here.REJOINING, again)


@fault("guest-started-before-run", "run-once")
def _(patch):
    """The destination runs a guest as soon as it is loaded."""
    row(patch, DestinationMachine, (There.LOADING, "GuestLoaded"), There.ACTIVE, destination_actions.start_guest)


@fault("unrun-though-it-ran", "one-owner")
def _(patch):
    """A source that comes back is told that the guest never ran."""
    refusal = DestinationMachine.refusal_of_return

    def wrong(self):
        return Refuse("unrun", "it never ran") if self.state in SWITCHED else refusal(self)

    patch(DestinationMachine, "refusal_of_return", wrong)


@fault("push-while-the-guest-runs", "still")
def _(patch):
    """The push begins with the data connections."""

    def early(machine, _event):
        machine.pushing = True
        return [does.StartPump(), does.StartPush(), does.StopGuest()]

    row(patch, SourceMachine, (Here.ATTACHING, "DataConnected"), Here.STOPPING, early)


@fault("silence-not-noticed", "noticed")
def _(patch):
    """The source waits for ever for a destination that says nothing."""
    deadline = SourceMachine._deadline
    patch(
        SourceMachine,
        "_deadline",
        lambda self, now, entered: None if self.step is Here.ACTIVE else deadline(self, now, entered),
    )


@fault("push-forgotten-on-the-way-back", "completes")
def _(patch):
    """Running begins the push before the data connections stand: an attempt that fails then takes it along."""
    table = dict(SourceMachine.table)
    for step in (Here.REJOINING, Here.REATTACHING):
        table[step, "Running"] = (step, source._running)
    patch(SourceMachine, "table", table)


@fault("pause-held-against-the-source", "patience")
def _(patch):
    """Looks at the pump during a pause count as looks at a source that owes pages."""
    starved = DestinationMachine._starved

    def counting(self, event):
        step, self.step = self.step, There.ACTIVE
        try:
            return starved(self, event)
        finally:
            self.step = step

    patch(DestinationMachine, "_starved", counting)


@fault("lost-without-poison", "nobody-waits")
def _(patch):
    """A guest that is given up is not told which pages are lost."""
    handle = DestinationMachine.handle

    def silent(self, event):
        return [command for command in handle(self, event) if not isinstance(command, does.Poison)]

    patch(DestinationMachine, "handle", silent)


@fault("ready-said-twice", "no-breach")
def _(patch):
    """The destination says twice that it is ready."""

    def twice(_machine, _event):
        return [does.Send(Ready()), does.Send(Ready())]

    row(patch, DestinationMachine, (There.PREPARING, "Prepared"), There.WAITING, twice)


@fault("late-data-connection-unknown", "no-mistake")
def _(patch):
    """Nobody thought of a data connection that is let in as its attempt ends."""
    late = {(There.PAUSED, "DataAttached"), (There.PAUSED, "LastDataAttached")}
    patch(DestinationMachine, "table", {key: what for key, what in DestinationMachine.table.items() if key not in late})


# --- the pump and the agents, as they are modelled --------------------------------------------------------


@fault("resume-forgets-faults", "asked")
def _(patch):
    """What faults wait for is not asked for again."""

    def forgetful(self):
        self.alone = False
        self._begin()

    patch(DestinationPump, "resume", forgetful)


@fault("wake-before-place", "woken-right")
def _(patch):
    """A page is shown to the guest as soon as its first bytes are there."""
    begin_run = Receiver._begin_run

    def early(self):
        begin_run(self)
        for key in self.run:
            self.pump.memory.write_behind(key, 0, b"")
            self.pump.memory._present(key)

    patch(Receiver, "_begin_run", early)


@fault("given-back-page-placed", "right-bytes")
def _(patch):
    """A page that the guest gave back while it was on its way is placed."""

    def careless(self, key, content):
        if content is None:
            self.pump.memory.write_behind(key, 0, b"")
            self.pump.memory.continue_(key)
        else:
            self.pump.memory.copy(key, content)
        self.pump.placed(key)

    patch(Receiver, "_place_one", careless)


@fault("old-connections-go-on", "claims-held")
def _(patch):
    """Whoever leaves connections behind still takes what comes over them."""

    def forgetful(self):
        self._ticking += 1
        self.lines = {}
        self.receivers = {}
        self.alone = True
        self.requested.clear()
        self.moved = True

    patch(DestinationPump, "detach", forgetful)


@fault("old-token-accepted", "proven")
def _(patch):
    """A data connection is let in with the token of any attempt."""

    def careless(self, end, preamble):
        current = self.current
        if current is not None and current.finish is None:
            current.attach("urgent" if preamble.role.name == "URGENT" else "push", end)
        else:
            end.close()

    patch(DestinationAgent, "_attach", careless)
