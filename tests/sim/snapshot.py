"""The agent that has a snapshot's file: who fetches from it, and what comes when it is killed or another is started.

It does what `link/fetched.py` and `link/snapshot.py` do, with a model of the pump and of the network. A file is its
name and, for each process that restores from it, the memory that the process should find.
"""

import msgpack

from postcopy.errors import ProtocolError
from postcopy.limits import PROGRESS_SECONDS
from postcopy.link.residence import Residence
from postcopy.session import commands as does
from postcopy.session.events import AliveDue, DataConnected, GuestStopped, PumpBroken, Received, Started
from postcopy.session.fetched import FetchedMachine
from postcopy.wire.control import Hello, Refuse, Welcome
from postcopy.wire.preamble import ACCEPTED, Role

from .door import Door
from .loop import Loop
from .source_pump import SourcePump

PIECE = 1 << 30  # of the file, for each process


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


class SnapshotAgent(Door):
    """The process of the source. `files`: name: memories; `name` is that of the file which it serves now."""

    control = Role.FETCH
    peer = "destination"

    def __init__(self, world, network):
        super().__init__(world, "source", network)
        self.processes = []
        self.files = {}
        self.name = b""
        self.loops = []
        self.most = 256
        self.evicting = 0.0  # how often whoever has said nothing yet is sent away
        self.pump_is = {}

    def accept(self, end):
        close_unproven = super().accept(end)
        if self.world.likely(self.evicting):
            self.host.after(0.01 * self.world.chance(), close_unproven)
        return close_unproven

    def greet(self, channel):
        if not channel.end.known_over:
            channel.send(Hello((3, 3), "sim"))

    def attach(self, role, preamble, end):
        self._find(preamble).let_in(role, end)

    def _find(self, preamble):
        for loop in reversed(self.loops):
            if (preamble.migration_id, preamble.token) == (loop.machine.migration_id, loop.machine.token):
                return loop
        raise ProtocolError("unknown migration or wrong token")

    def answer(self, channel, message):
        if not isinstance(message, Welcome):
            channel.end.close()
            return
        if len(self.loops) >= self.most:
            self.refuse(channel, Refuse("busy", "others fetch"))
            return
        process = self.processes[message.pieces[0].offset // PIECE]
        loop = FetchedLoop(self, FetchedMachine(Hello((3, 3), "sim"), PIECE * len(self.processes)), process)
        self.loops.append(loop)
        process.source = loop
        loop.post(Started(self.world.now))
        loop.post(Received(self.world.now, message))
        loop.listen(channel)

    def _was_killed(self):
        super()._was_killed()
        self.loops = []
        for process in self.processes:
            process.source = None

    def start_again(self, name):
        """Listen again, with this file."""
        self.world.tell("source", "is started again with", name.decode())
        self.name = name
        self.open()
