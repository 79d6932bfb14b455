"""Deliberate faults of the way back: what somebody asked for is forgotten, or what the destination has."""

from functools import partial

from postcopy.session import commands as does
from postcopy.session.destination import DestinationMachine
from postcopy.session.source import SourceMachine

from . import deliberate
from .source import SourceLoop

FAULTS = []
fault = partial(deliberate.fault, into=FAULTS)


def forgetful():
    """Have a machine be held by nobody."""
    return property(lambda _self: False, lambda _self, _held: None)


@fault("source-does-not-hold", "held")
def _(patch):
    """A source that was asked to pause dials again by itself."""
    patch(SourceMachine, "held", forgetful(), raising=False)


@fault("destination-does-not-hold", "held")
def _(patch):
    """A destination that was asked to pause takes its source back."""
    patch(DestinationMachine, "held", forgetful(), raising=False)


@fault("residence-not-told", "told-all")
def _(patch):
    """The destination leaves out what it has: all of it is sent again."""
    handle = DestinationMachine.handle

    def silent(self, event):
        return [command for command in handle(self, event) if not isinstance(command, does.TellResidence)]

    patch(DestinationMachine, "handle", silent)


@fault("residence-not-heard", "told-all")
def _(patch):
    """The source does not listen to what the destination has."""

    async def deaf(self, command):
        self.agent.rules.told(self, command.have)

    patch(SourceLoop, "do_NoteResidence", deaf)
