"""Deliberate faults of memory that is fetched, in the code and, where the real thing is a model here, in the model."""

from postcopy.pages import PageState
from postcopy.session import commands as does
from postcopy.session import fetching as fetching_room
from postcopy.session.destination_recovery import stay
from postcopy.session.destination_steps import Step
from postcopy.session.fetched import FetchedMachine
from postcopy.session.fetching import FetchingMachine

from . import fetching
from .deliberate import Faults, forgetful, row, without

FAULTS = Faults()
fault = FAULTS.fault


@fault("other-memory-taken", "right-bytes")
def _(patch):
    """Pages come from an agent that serves another file by now."""
    row(patch, FetchingMachine, (Step.RELOADING, "StateOther"), Step.RELOADING, fetching_room._loaded)


@fault("attempt-waits-for-ever", "completes")
def _(patch):
    """A connection that breaks on the way back is no end of the attempt, and it has no patience."""
    row(patch, FetchingMachine, (Step.REJOINING, "ControlLost"), Step.REJOINING, stay)
    patch(FetchingMachine, "patience", {})


@fault("dials-once", "completes")
def _(patch):
    """Behind an attempt that failed there is no other."""
    deadline = FetchingMachine._deadline

    def once(self, now, entered):
        return None if self.step is Step.PAUSED and self.attempts else deadline(self, now, entered)

    patch(FetchingMachine, "_deadline", once)


@fault("old-connections-in-the-way", "no-mistake")
def _(patch):
    """A data connection of an attempt that somebody broke off is an event that nobody knows."""
    table = {key: line for key, line in FetchingMachine.table.items() if key != (Step.REDIALLING, "DataAttached")}
    patch(FetchingMachine, "table", table)


@fault("silence-of-a-destination", "noticed")
def _(patch):
    """A source waits for ever for whoever fetches."""
    patch(FetchedMachine, "_deadline", lambda _self, _now, _entered: None)


@fault("placed-page-not-kept", "placed-once")
def _(patch):
    """The next agent fetches once more what a killed one had placed."""
    patch(fetching, "HERE", {PageState.ZERO: PageState.ZERO, PageState.DROPPED: PageState.ZERO})


@fault("zeros-not-kept", "right-bytes")
def _(patch):
    """The next agent fetches what the process had given back."""
    patch(fetching, "HERE", {PageState.PLACED: PageState.PLACED})


@fault("nobody-woken-by-the-next-agent", "nobody-waits")
def _(patch):
    """Who waited for a page that a killed agent had been told of waits on."""
    patch(fetching.FetchingLoop, "wake_all", lambda _self: None)


@fault("does-not-hold", "held")
def _(patch):
    """Who was asked to pause dials again by itself."""
    patch(FetchingMachine, "held", forgetful(), raising=False)


@fault("pause-not-kept", "held")
def _(patch):
    """The next agent does not know that somebody asked to pause."""
    without(patch, FetchingMachine, does.KeepRecord)
