"""The network: connections as two pipes of bytes, each with a delay, a rate and troubles of its own.

What is sent enters as bytes and arrives in pieces cut anywhere, in order on one connection and in no order between two.
A pipe can be cut at any byte, swallow everything without a word, or hold its bytes back and deliver them late.
"""

from collections import deque

# A connection on which bytes are never acknowledged is ended by the kernel (TCP_USER_TIMEOUT, keepalive).
UNACKNOWLEDGED_SECONDS = 6.0


class End:
    """One process's end of a connection. `taken` gets bytes, `over` the end of it; `known_over`: the kernel knows."""

    def __init__(self, connection, host, number):
        self.connection = connection
        self.host = host
        self.number = number
        self.peer = None
        self.out = None  # the pipe away from here
        self.closed = False
        self.known_over = False
        self.heard_at = connection.network.world.now
        self.unread = bytearray()
        self._taken = self._over = None
        self._why = None
        host.ends.add(self)

    def listen(self, taken, over):
        """Have what came and what comes given to `taken(bytes)`, and the end told to `over(why, broken)`, once."""
        self._taken, self._over = taken, over
        if self.unread:
            data, self.unread = bytes(self.unread), bytearray()
            taken(data)
        if self._why is not None and self._over is not None and not self.closed:
            self._over(*self._why)

    def send(self, data):
        """Send bytes; to a connection that is over they go nowhere."""
        if not self.closed and not self.known_over:
            self.out.carry(data)

    def close(self):
        """Hang up: what was sent still arrives, and then the end of it."""
        if not self.closed:
            self.closed = True
            self.host.ends.discard(self)
            self._taken = self._over = None
            self.out.finish()

    def arrive(self, data):
        """Take bytes off the pipe, into this process's hands or into its kernel's."""
        if self.closed or self.known_over:
            return
        self.heard_at = self.connection.network.world.now
        if self._taken is None:
            self.unread += data
        else:
            self._taken(data)

    def end(self, why, broken):
        """Learn that the connection is over: an end (or, `broken`, an error that takes unread bytes with it)."""
        if self.closed or self.known_over:
            return
        self.known_over = True
        self._why = (why, broken)
        if broken:
            self.unread.clear()
        if self._over is not None:
            self._over(why, broken)


class Pipe:
    """One direction of a connection."""

    def __init__(self, world, connection, delay, rate):
        self.world = world
        self.connection = connection
        self.to = None  # End
        self.delay = delay
        self.rate = rate  # bytes a second
        self.flying = 0
        self.left = None  # bytes until it is cut
        self.mute = False  # swallows everything
        self.held_until = 0.0
        self._free_at = 0.0  # when it has carried what it was given
        self._queue = deque()

    def carry(self, data):
        """Have bytes arrive, in pieces."""
        if self.mute or self.connection.broken:
            return
        chance = self.world.chance
        while len(data) > 1 and chance() < 0.3:
            cut = 1 + int(chance() * (len(data) - 1))
            self._fly(data[:cut], cut)
            data = data[cut:]
        self._fly(data, len(data))

    def finish(self):
        """Have the end arrive behind everything else."""
        if not self.mute and not self.connection.broken:
            self._fly(None, 0)

    def _fly(self, piece, length):
        world = self.world
        self.flying += length
        self._queue.append(piece)
        late = self.delay * world.chance() if world.chance() < 0.1 else 0.0
        self._free_at = max(self._free_at, world.now + late) + length / self.rate
        self.to.host.after(self._free_at + self.delay - world.now, self._land)

    def _land(self):
        world = self.world
        if world.now < self.held_until:
            self.to.host.after(self.held_until - world.now, self._land)
            return
        piece = self._queue.popleft()
        if self.connection.broken:
            return
        if piece is None:
            self.to.end("the other agent closed the connection", False)
            return
        self.flying -= len(piece)
        if self.left is not None:
            self.left -= len(piece)
            if self.left <= 0:
                self.to.arrive(piece[: len(piece) + self.left])
                self.connection.cut("cut after so many bytes")
                return
        self.to.arrive(piece)


class Connection:
    """Two ends. `attempt` is what the dialler dialled it for."""

    def __init__(self, network, dialler, listener, name, number, attempt):
        world = network.world
        self.network = network
        self.name = name
        self.attempt = attempt
        self.broken = False
        self.here = End(self, dialler, 2 * number)
        self.there = End(self, listener, 2 * number + 1)
        delay = network.delay * world.between(0.5, 1.5)
        lag = world.chance() if world.likely(network.lagging) else 0.0
        for end, peer in ((self.here, self.there), (self.there, self.here)):
            end.peer = peer
            end.out = Pipe(world, self, delay, network.rate)
            end.out.to = peer
            end.out.held_until = world.now + lag

    def cut(self, why, within=0.02):
        """Break it: what is under way is lost, and both ends find out, each in its time."""
        if self.broken:
            return
        self.broken = True
        world = self.network.world
        world.tell("network", "breaks", self.name, why)
        for end in (self.here, self.there):
            end.host.after(world.chance() * within, end.end, "Connection reset by peer", True)

    def silence(self, both):
        """Swallow what is sent, in one direction or in both, without a word; the kernels find out much later."""
        world = self.network.world
        world.tell("network", "half open" if not both else "silent", self.name)
        self.here.out.mute = self.here.out.mute or both or world.likely(0.5)
        self.there.out.mute = self.there.out.mute or both or not self.here.out.mute
        world.after(UNACKNOWLEDGED_SECONDS * world.between(0.9, 1.3), self.cut, "nothing was acknowledged")

    def hold(self, until):
        """Deliver nothing before `until`: a link that is down for a while loses nothing that is sent again."""
        for end in (self.here, self.there):
            end.out.held_until = max(end.out.held_until, until)


class Network:
    """All connections, and the way to make one. `delay` in seconds, `rate` in bytes a second."""

    def __init__(self, world, delay, rate):
        self.world = world
        self.delay = delay
        self.rate = rate
        self.port = None  # who listens: a Host, and what to call with the End of each connection
        self.dark_until = 0.0
        self.refusing_until = 0.0
        self.lagging = 0.0  # this part of new connections carries nothing at first
        self.hold_next = {}  # role: to which end the next one carries nothing at first, and for how many seconds
        self.connections = []
        self.to_be_cut = deque()  # bytes after which the next connections are cut, None: not at all
        self._made = 0

    def open(self):
        """Return the connections that stand."""
        self.connections = [
            one for one in self.connections if not one.broken and not (one.here.closed and one.there.closed)
        ]
        return self.connections

    def partition(self, seconds):
        """Let nothing through for a while."""
        self.world.tell("network", "dark", f"{seconds:.3f} s")
        self.dark_until = self.world.now + seconds
        for connection in self.open():
            connection.hold(self.dark_until)

    def dial(self, host, name, attempt, made, refused):
        """Connect from `host`: `made(end)` or `refused(why)` is called in its time. Returns a call that gives up."""
        dialling = {"wanted": True}
        trip = 2 * self.delay * self.world.between(0.5, 1.5) + max(0.0, self.dark_until - self.world.now)
        host.after(trip, self._answer, dialling, host, name, attempt, made, refused)
        return lambda: dialling.update(wanted=False)

    def _answer(self, dialling, host, name, attempt, made, refused):
        if not dialling["wanted"]:
            return
        world = self.world
        if world.now < self.dark_until:
            host.after(self.dark_until - world.now, self._answer, dialling, host, name, attempt, made, refused)
            return
        if self.port is None or world.now < self.refusing_until:
            refused("Connection refused")
            return
        listener, accept = self.port
        self._made += 1
        connection = Connection(self, host, listener, f"{name} {self._made}", self._made, attempt)
        self.connections.append(connection)
        if name in self.hold_next:
            to, seconds = self.hold_next.pop(name)
            (connection.here if to == "there" else connection.there).out.held_until = world.now + seconds
        if self.to_be_cut:
            pipe, left = self.to_be_cut.popleft() or (None, 0)
            if pipe is not None:
                (connection.here if pipe == "there" else connection.there).out.left = left
        listener.after(0.0, accept, connection.there)
        made(connection.here)
