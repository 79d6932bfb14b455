"""An agent's port: who proves himself at it within his time, and what becomes of whoever does not.

It does what `link/listen.py` does, with a model of the network.
"""

from postcopy.errors import LinkError, ProtocolError
from postcopy.wire.preamble import PREAMBLE_BYTES, Role, unpack

from .loop import Channel
from .world import Host

UNPROVEN_SECONDS = 5.0
DATA = {Role.URGENT: "urgent", Role.PUSH: "push"}


class Door:
    """A process that listens. Subclasses say which `control` role comes in, `peer`: from whom, and what is done then.

    `attach(role, preamble, end)` takes a data connection, `answer(channel, message)` a control connection's first
    message; either raises LinkError or ProtocolError where it is closed instead.
    """

    control = Role.CONTROL
    peer = ""

    def __init__(self, world, name, network):
        self.world = world
        self.host = Host(world, name)
        self.host.killed.append(self._was_killed)
        self.network = network
        self.open()

    def open(self):
        """Listen."""
        self.host.alive = True
        self.network.port = (self.host, self.accept)

    def _was_killed(self):
        self.network.port = None

    def attach(self, role, preamble, end):
        raise NotImplementedError

    def answer(self, channel, message):
        raise NotImplementedError

    def greet(self, channel):
        """Say something before the other side does."""

    # --- who comes in -------------------------------------------------------------------------------------

    def accept(self, end):
        """Have who comes in prove himself. Returns a call that closes the connection if that has not happened yet."""
        buffer = bytearray()

        def taken(data):
            buffer.extend(data)
            if len(buffer) >= PREAMBLE_BYTES:
                end.listen(None, None)
                end.unread += buffer[PREAMBLE_BYTES:]
                self._prove(end, unpack(bytes(buffer[:PREAMBLE_BYTES])))

        def close_unproven():
            if len(buffer) < PREAMBLE_BYTES:
                end.close()

        end.listen(taken, lambda _why, _broken: end.close())
        self.host.timer(UNPROVEN_SECONDS, close_unproven)
        return close_unproven

    def _prove(self, end, preamble):
        if preamble.role is self.control:
            channel = Channel(end, self.peer)
            channel.begin_alone(lambda message: self._first(channel, message))
            self.host.timer(UNPROVEN_SECONDS, lambda: channel.loop is None and end.close())
            self.greet(channel)
            return
        try:
            self.attach(DATA[preamble.role], preamble, end)
        except (LinkError, ProtocolError) as error:
            self._closes(end, error)

    def _first(self, channel, message):
        if message is None:
            channel.end.close()
            return
        try:
            self.answer(channel, message)
        except LinkError as error:  # it has gone meanwhile
            self._closes(channel.end, error)

    def _closes(self, end, error):
        self.world.tell(self.host.name, "closes", end.connection.name, str(error))
        end.close()

    # --- who is answered here, and not by a migration -----------------------------------------------------

    def refuse(self, channel, refusal):
        """Send somebody away."""
        channel.loop = self
        channel.send(refusal)
        channel.end.close()

    def now(self):
        return self.world.now

    def post(self, _event, channel=None):
        """Hear what a connection that was answered here still says, and let it go."""
        if channel is not None:
            channel.end.close()

    def received(self, _message, channel):
        """Do the same."""
        channel.end.close()
