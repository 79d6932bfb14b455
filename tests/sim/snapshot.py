"""The agent that has a snapshot's file: who fetches from it, and what comes when it is killed or another is started.

It does what `link/fetched.py` and `link/snapshot.py` do, with a model of the pump and of the network. A file is its
name and, for each process that restores from it, the memory that the process should find.
"""

import contextlib

import msgpack

from postcopy.errors import LinkError, ProtocolError
from postcopy.limits import PROGRESS_SECONDS
from postcopy.link.residence import Residence
from postcopy.session import commands as does
from postcopy.session.events import AliveDue, DataConnected, GuestStopped, PumpBroken, Received, Started
from postcopy.session.fetched import FetchedMachine
from postcopy.wire.control import Hello, Refuse, Welcome
from postcopy.wire.preamble import ACCEPTED, PREAMBLE_BYTES, Role, unpack

from .loop import Channel, Loop
from .source_pump import SourcePump
from .world import Host

PIECE = 1 << 30  # of the file, for each process
UNPROVEN_SECONDS = 5.0


class FetchedLoop(Loop):
    """Performs the commands of a source for one fetch."""

    def __init__(self, agent, machine, process):
        self.agent = agent
        self.process = process
        self.pump = None
        self.name = agent.name  # of the file at the pump's beginning
        self._lines = {}
        self._ready = self._alive = False
        self._residence = None
        super().__init__("source", machine, agent.host)

    def performers(self):
        return {getattr(does, name[3:]): getattr(self, name) for name in dir(self) if name.startswith("do_")}

    def let_in(self, role, end):
        """Take a data connection that proved itself."""
        self.process.rules.let_in(self, end)
        end.send(ACCEPTED)
        self._lines[role] = end
        self._attach()

    async def do_NoteResidence(self, command):  # noqa: N802
        self.process.rules.told(self, command.have)
        self._residence = self._residence or Residence(self.machine.offer.layout())
        self._residence.add(command.have)

    async def do_DialData(self, _command):  # noqa: N802
        self._ready = True
        self._attach()

    def _attach(self):
        if not self._ready or len(self._lines) < 2 or self.pump is not None:
            return
        memory = self.agent.files[self.name][self.process.number]
        pump = self.pump = SourcePump(self.host, self.process.layout, memory, beats=True, **self.agent.pump_is)
        pump.woke = lambda: self._pump_woke(pump)
        if self._residence is not None:
            self._residence.skip_in(pump)
        for role, end in self._lines.items():
            pump.attach(role, end)
        self.post(DataConnected(self.now()))

    def _pump_woke(self, pump):
        if pump is self.pump and pump.broken is not None:
            self.post(PumpBroken(self.now(), pump.broken))

    async def do_StartPump(self, _command):  # noqa: N802
        self.pump.start()

    async def do_StopGuest(self, _command):  # noqa: N802
        self.post(GuestStopped(self.now(), msgpack.packb({"memory": self.name}), self.now(), "boot"))

    async def do_WatchData(self, _command):  # noqa: N802
        self.pump.watch()
        if not self._alive:
            self._alive = True
            self.host.timer(PROGRESS_SECONDS, self._say_alive)

    def _say_alive(self):
        if self.finish is None:
            self.post(AliveDue(self.now()))
            self.host.timer(PROGRESS_SECONDS, self._say_alive)

    async def do_StartPush(self, _command):  # noqa: N802
        self.pump.push()

    async def do_StopPump(self, _command):  # noqa: N802
        if self.pump is not None:
            self.pump.stop()
            self.pump = None

    async def do_ResumeGuest(self, _command):  # noqa: N802
        pass

    async def do_ReleaseMemory(self, _command):  # noqa: N802
        pass

    def ended(self):
        for end in self._lines.values():
            end.close()
        self.agent.loops.remove(self)


class SnapshotAgent:
    """The process of the source. `files`: name: memories; `name` is that of the file which it serves now."""

    def __init__(self, world, network):
        self.world = world
        self.host = Host(world, "source")
        self.host.killed.append(self._was_killed)
        self.network = network
        self.processes = []
        self.files = {}
        self.name = b""
        self.loops = []
        self.most = 256
        self.evicting = 0.0  # how often whoever has said nothing yet is sent away
        self.pump_is = {}
        network.port = (self.host, self._accept)

    def _accept(self, end):
        buffer = bytearray()

        def taken(data):
            buffer.extend(data)
            if len(buffer) >= PREAMBLE_BYTES:
                end.listen(None, None)
                end.unread += buffer[PREAMBLE_BYTES:]
                self._prove(end, unpack(bytes(buffer[:PREAMBLE_BYTES])))

        end.listen(taken, lambda _why, _broken: end.close())
        self.host.timer(UNPROVEN_SECONDS, lambda: len(buffer) < PREAMBLE_BYTES and end.close())
        if self.world.likely(self.evicting):
            self.host.after(0.01 * self.world.chance(), lambda: len(buffer) < PREAMBLE_BYTES and end.close())

    def _prove(self, end, preamble):
        if preamble.role is Role.FETCH:
            channel = Channel(end, "destination")
            channel.begin_alone(lambda message: self._first(channel, message))
            self.host.timer(UNPROVEN_SECONDS, lambda: channel.loop is None and end.close())
            if not end.known_over:
                channel.send(Hello((3, 3), "sim"))
            return
        try:
            loop = self._find(preamble)
            loop.let_in("urgent" if preamble.role is Role.URGENT else "push", end)
        except (ProtocolError, LinkError) as error:
            self.world.tell("source", "closes", end.connection.name, str(error))
            end.close()

    def _find(self, preamble):
        for loop in reversed(self.loops):
            if (preamble.migration_id, preamble.token) == (loop.machine.migration_id, loop.machine.token):
                return loop
        raise ProtocolError("unknown migration or wrong token")

    def _first(self, channel, message):
        if not isinstance(message, Welcome):
            channel.end.close()
            return
        if len(self.loops) >= self.most:
            channel.loop = self
            with contextlib.suppress(LinkError):
                channel.send(Refuse("busy", "others fetch"))
            channel.end.close()
            return
        process = self.processes[message.pieces[0].offset // PIECE]
        loop = FetchedLoop(self, FetchedMachine(Hello((3, 3), "sim"), PIECE * len(self.processes)), process)
        self.loops.append(loop)
        process.source = loop
        loop.post(Started(self.world.now))
        loop.post(Received(self.world.now, message))
        loop.listen(channel)

    def now(self):
        return self.world.now

    def post(self, _event, channel=None):
        """Let a connection go that was refused."""
        if channel is not None:
            channel.end.close()

    def received(self, _message, channel):
        """Do the same."""
        channel.end.close()

    def _was_killed(self):
        self.network.port = None
        self.loops = []
        for process in self.processes:
            process.source = None

    def start_again(self, name):
        """Listen again, with this file."""
        self.world.tell("source", "is started again with", name.decode())
        self.host.alive = True
        self.name = name
        self.network.port = (self.host, self._accept)
