"""Deliberate faults of the session: who may do what and when, on the way forward and on the way back."""

from dataclasses import replace

from postcopy.link.keeping import Record
from postcopy.session import commands as does
from postcopy.session import destination_actions, source, source_recovery
from postcopy.session.destination import DestinationMachine
from postcopy.session.destination_steps import Step as There
from postcopy.session.source import SourceMachine
from postcopy.session.source_steps import Step as Here
from postcopy.session.states import SWITCHED
from postcopy.wire.control import Ready, Refuse, Run

from .deliberate import Faults, forgetful, row, without
from .destination import DestinationAgent
from .source import SourceLoop

FAULTS = Faults()
fault = FAULTS.fault


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
    without(patch, DestinationMachine, does.Poison)


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


@fault("old-token-accepted", "proven")
def _(patch):
    """A data connection is let in with the token of any attempt."""

    def careless(self, role, _preamble, end):
        current = self.current
        if current is not None and current.finish is None:
            current.attach(role, end)
        else:
            end.close()

    patch(DestinationAgent, "attach", careless)


# --- what somebody asked for is forgotten, or what the destination has ------------------------------------


@fault("source-does-not-hold", "held")
def _(patch):
    """A source that was asked to pause dials again by itself."""
    patch(SourceMachine, "held", forgetful(), raising=False)


@fault("destination-does-not-hold", "held")
def _(patch):
    """A destination that was asked to pause takes its source back."""
    patch(DestinationMachine, "held", forgetful(), raising=False)


@fault("pause-not-kept", "held")
def _(patch):
    """A source that takes a killed one's place does not know that somebody paused."""
    unpack = Record.unpack
    patch(Record, "unpack", classmethod(lambda _cls, data: replace(unpack(data), held=False)))


@fault("pause-of-what-is-paused-not-kept", "held")
def _(patch):
    """A source that is paused already does not have kept that somebody asks for it, too."""
    hold = source_recovery.hold

    def forgetting(machine, event):
        return [one for one in hold(machine, event) if not isinstance(one, does.KeepRecord)]

    rows = {key: (step, forgetting) for key, (step, action) in SourceMachine.table.items() if action is hold}
    patch(SourceMachine, "table", {**SourceMachine.table, **rows})


@fault("residence-not-told", "told-all")
def _(patch):
    """The destination leaves out what it has: all of it is sent again."""
    without(patch, DestinationMachine, does.TellResidence)


@fault("residence-not-heard", "told-all")
def _(patch):
    """The source does not listen to what the destination has."""

    async def deaf(self, command):
        self.agent.rules.told(self, command.have)

    patch(SourceLoop, "do_NoteResidence", deaf)
