"""The interpreter's loop: events in their order, and the one that overtakes them all."""

import asyncio
import socket

from postcopy.link.control import ControlChannel
from postcopy.link.interpreter import Interpreter
from postcopy.session.commands import Finish, ResumeGuest, StartPush, StopPump
from postcopy.session.events import Connected, ControlLost, DataConnected, GuestStopped, Received, Started
from postcopy.wire.control import Loaded, Ready, Welcome
from tests.session.samples import IDENTITY, source


class Recorder(Interpreter):
    """A source without a guest: it only writes down what it was told to do."""

    def __init__(self, machine):
        self.done = []
        super().__init__("source", machine)

    def performers(self):
        async def note(command):
            self.done.append(type(command).__name__)

        from postcopy.session import commands

        own = (commands.Connect, commands.DialData, commands.StopGuest, commands.StartPump)
        return dict.fromkeys((*own, ResumeGuest, StartPush, StopPump), note)


def test_a_run_that_meets_a_closed_connection_is_judged_before_the_end_of_the_connection():
    """Loaded and the end of the connection arrive together: Run cannot leave, so the source keeps its guest."""

    async def story():
        near, far = socket.socketpair()
        interpreter = Recorder(source())
        interpreter.channel = await ControlChannel.over(near, "far")
        events = [
            Started(0.0),
            Connected(0.0),
            Received(0.0, Welcome(2, *IDENTITY, "x")),
            Received(0.0, Ready()),
            DataConnected(0.0),
            GuestStopped(0.0, b"", 0.0, "boot"),
        ]
        for event in events:
            await interpreter._step(event)
        far.close()
        reader = interpreter.channel._reader
        while not reader.at_eof() and reader.exception() is None:
            await asyncio.sleep(0.001)
        interpreter.post(Received(0.0, Loaded()))
        interpreter.post(ControlLost(0.0, "far closed the connection"))
        finish = await interpreter.run()
        assert interpreter.done[-2:] == ["ResumeGuest", "StopPump"]
        return finish

    finish = asyncio.run(asyncio.wait_for(story(), 10))
    assert isinstance(finish, Finish)
    assert (finish.state, finish.owner, finish.exit_status) == ("failed", "source", 4)


def test_a_performer_that_breaks_does_not_keep_the_rest_from_being_done():
    async def story():
        interpreter = Recorder(source())

        async def breaks(command):
            raise ZeroDivisionError("a mistake of ours")

        interpreter._performers[ResumeGuest] = breaks
        interpreter.machine.step = "loading"
        interpreter.post(ControlLost(0.0, "cut"))
        finish = await interpreter.run()
        assert interpreter.done == ["StopPump"]
        return finish

    assert asyncio.run(asyncio.wait_for(story(), 10)).exit_status == 4
