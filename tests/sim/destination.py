"""The destination's agent: the commands of its machine, its port, and what becomes of it when it is killed.

It does what `link/destination_interpreter.py`, `way_back.py`, `returning.py`, `listen.py` and `destination.py` do, with
a model of the pump and of the network.
"""

from postcopy.errors import HostError, ProtocolError
from postcopy.limits import MIGRATION_ID_BYTES, PROGRESS_SECONDS, RELEASE_SECONDS, TOKEN_BYTES
from postcopy.link.residence import what_is_here
from postcopy.session import commands as does
from postcopy.session.commands import Send
from postcopy.session.destination import DestinationMachine
from postcopy.session.events import (
    AllResident,
    DataAttached,
    GuestLoaded,
    GuestRunning,
    Prepared,
    Progressed,
    PumpBroken,
    Received,
    Rejoined,
    Resident,
)
from postcopy.wire.control import AllPlaced, Refuse, Resume, Welcome
from postcopy.wire.latencies import BUCKETS, NOTHING, Latencies, SparseHistogram
from postcopy.wire.messages import UNKNOWN
from postcopy.wire.preamble import ACCEPTED

from .destination_pump import DestinationPump
from .door import Door
from .loop import Loop
from .memory import DestinationMemory

FIRST_STEP_LOOK_SECONDS = 0.001
FIRST_STEP_SECONDS = 1.0


class DestinationLoop(Loop):
    """Performs the destination's commands."""

    def __init__(self, agent, machine):
        self.agent = agent
        self.memory = None
        self.pump = None
        self.report = None
        self.latencies = NOTHING
        self.guest_here = False
        self._watched = False
        self._told_running = False
        self._attached = set()
        super().__init__("destination", machine, agent.host)

    def performers(self):
        return {getattr(does, name[3:]): getattr(self, name) for name in dir(self) if name.startswith("do_")}

    # --- the way forward ----------------------------------------------------------------------------------

    async def do_Prepare(self, _command):  # noqa: N802
        agent = self.agent
        agent.claim(self)
        if self.world.likely(agent.failing):
            self.work(0.01 * self.world.chance(), self._fail, "no room")
        else:
            self.host.after(0.005 * self.world.chance(), self._prepared)

    def _fail(self, text):
        raise HostError(text)

    def _prepared(self):
        if self.finish is not None:
            return
        agent = self.agent
        self.memory = DestinationMemory(agent.guest)
        self.pump = DestinationPump(
            self.host, agent.layout, self.memory, alias=agent.alias, beats=self.machine.recoverable
        )
        self.pump.woke = self.pump_woke
        self.post(Prepared(self.now()))

    def attach(self, role, end):
        """Give a proven connection to the pump; ProtocolError where none is wanted."""
        if self.pump is None or not self.machine.wants_data:
            raise ProtocolError("no migration waits for a data connection")
        if role in self._attached:
            raise ProtocolError(f"a second connection for {role}")
        self.agent.rules.let_in(self, end)
        end.send(ACCEPTED)
        self._attached.add(role)
        self.pump.attach(role, end)
        self.post(DataAttached(self.now(), role, self.machine.token))

    async def do_StartPump(self, _command):  # noqa: N802
        self.pump.start()
        self._watched = True

    async def do_Load(self, _command):  # noqa: N802
        if self.world.likely(self.agent.failing):
            raise HostError("the guest's state is none")
        self.post(GuestLoaded(self.now()))

    async def do_StartGuest(self, _command):  # noqa: N802
        self.agent.start_guest(self)
        self.guest_here = True
        self.agent.guest.on_first_step = self._first_step_made
        self.host.timer(PROGRESS_SECONDS, self._progress)

    def _first_step_made(self):
        self.host.after(FIRST_STEP_LOOK_SECONDS * self.world.chance(), self._tell_running)

    def _tell_running(self):
        if not self._told_running and (first := self.agent.guest.first_step_at) is not None:
            self._told_running = True
            self.post(GuestRunning(self.now(), first))
        return self._told_running

    async def do_WatchData(self, _command):  # noqa: N802
        self.pump.watch()

    def _progress(self):
        pump = self.pump
        if pump is None or self.finish is not None:
            return
        told = (len(pump.pending), pump.received_bytes, 0, self._latencies())
        self.post(Progressed(self.now(), pump.resident, pump.total, pump.faults, *told))
        self.host.timer(PROGRESS_SECONDS, self._progress)

    # --- the pump and the last page -----------------------------------------------------------------------

    def pump_woke(self):
        """Hear of the pump that it has every page, or wants new connections."""
        if self.pump is None or not self._watched:
            return
        if self.pump.state == "complete":
            self._watched = False
            self.post_first(Resident(self.now()))
        elif self.pump.broken is not None:
            self.post(PumpBroken(self.now(), self.pump.broken))

    async def _step(self, event):
        # as the real one: the pump is looked at before any event is judged
        if self._watched and self.pump is not None and self.pump.state == "complete":
            self._watched = False
            await super()._step(Resident(self.now()))
        await super()._step(event)

    async def do_MakeReport(self, _command):  # noqa: N802
        if self._tell_running():
            self._sum_up()
        else:
            self._await_first_step(self.now() + FIRST_STEP_SECONDS)

    def _await_first_step(self, until):
        if self._tell_running() or self.now() >= until:
            self._sum_up()
        else:
            self.host.after(0.02, self._await_first_step, until)

    def _sum_up(self):
        if self.report is None:
            self.report = {"pages": {"total": self.pump.total}}
            self.latencies = self._latencies()
            self.post(AllResident(self.now(), self.report, self.latencies))

    def _latencies(self):
        """Return a histogram that no other number of faults has."""
        faults = self.pump.faults
        return Latencies(SparseHistogram(tuple((number, 1) for number in range(min(faults, BUCKETS))), faults, faults))

    async def do_Settle(self, _command):  # noqa: N802
        self.agent.rules.settles(self)
        self.memory.trap_no_more()
        self._sum_up()

    async def do_StopPump(self, _command):  # noqa: N802
        self.pump.stop()

    async def _send(self, command):
        self.agent.rules.sends(self, command.message)
        await super()._send(command)

    # --- without connections, and with new ones -----------------------------------------------------------

    def rejoin(self, channel, token):
        channel.version = self.machine.version
        self.listen(channel)
        self.post(Rejoined(self.now(), token), channel)

    async def do_DetachData(self, _command):  # noqa: N802
        self._attached.clear()
        if self.pump is not None:
            self.pump.detach()
            self.agent.rules.detached(self.pump)

    async def _drop_control(self, command):
        if self.channel is self._addressed:  # as the real one
            await super()._drop_control(command)

    async def do_TellResidence(self, _command):  # noqa: N802
        for have in what_is_here(self.agent.layout, self.pump):
            await self._send(Send(have))

    async def do_ResumePump(self, _command):  # noqa: N802
        self.pump.resume()

    async def do_Poison(self, _command):  # noqa: N802
        if self.agent.takes_poison:
            self.pump.poison()

    async def do_HoldMemory(self, _command):  # noqa: N802
        pass

    async def do_KeepRecord(self, _command):  # noqa: N802
        pass

    async def do_Discard(self, _command):  # noqa: N802
        self.agent.rules.discards(self)
        if self.pump is not None:
            self.pump.stop()
        self.memory = self.pump = None
        self._watched = False

    def ended(self):
        self.agent.ended(self)


class DestinationAgent(Door):
    """The process of the destination: its port, its one place for a guest, the migrations that it knows."""

    peer = "source"

    def __init__(self, world, network, guest, rules):
        super().__init__(world, "destination", network)
        self.guest = guest
        self.layout = guest.layout
        self.rules = rules
        self.known = {}  # migration id: loop
        self.current = None
        self.guest_lost = False  # it ran here, and its process was killed
        self.failing = 0.0
        self.versions = (2, 3)
        self.kind = DestinationMachine
        self.hasty = []  # patience with the first sources, where there is one limit up to Run
        self.give_up_seconds = None
        self.takes_poison = True
        self.alias = False
        self.at_the_door = lambda: None  # called before a data connection is let in
        self._drawn = 0

    def _token(self, size):
        self._drawn += 1
        return self._drawn.to_bytes(size, "big")

    # --- who comes in -------------------------------------------------------------------------------------

    def attach(self, role, preamble, end):
        current = self.current
        if current is None or current.finish is not None:
            raise ProtocolError("a data connection, and no migration is running")
        machine = current.machine
        if (preamble.migration_id, preamble.token) != (machine.migration_id, machine.token):
            raise ProtocolError("unknown migration or wrong token")
        self.at_the_door()
        current.attach(role, end)

    def answer(self, channel, message):
        if isinstance(message, Resume):
            self._returns(channel, message)
        elif self.current is not None and (self.current.finish is None or self.current.guest_here):
            self.refuse(channel, Refuse("busy", "this destination has a guest already"))
        else:
            identity = (self._token(MIGRATION_ID_BYTES), self._token(TOKEN_BYTES))
            machine = self.kind(
                self.versions, identity, "sim", "boot", self.world.now, give_up_seconds=self.give_up_seconds
            )
            if self.hasty:  # Run comes before, in the middle of, or behind the end of its patience
                machine.offered_seconds = machine.heard_out_seconds = self.hasty.pop()
            loop = DestinationLoop(self, machine)
            loop.listen(channel)
            loop.post(Received(self.world.now, message), channel)

    def claim(self, loop):
        """Take the one place for a guest."""
        if self.current is not None and self.current.finish is None:
            raise HostError("this destination is in the middle of a migration")
        self.current = loop
        self.known[loop.machine.migration_id] = loop

    def _returns(self, channel, resume):
        loop = self.known.get(resume.migration_id)
        proven = loop is not None and resume.token == loop.machine.first_token
        refusal = loop.machine.refusal_of_return() if proven else Refuse(UNKNOWN, "there is no such migration here")
        if refusal is not None:
            self.refuse(channel, refusal)
        elif loop.finish is None:
            loop.rejoin(channel, self._token(TOKEN_BYTES))
        else:
            self._answer_late(channel, loop)

    def _answer_late(self, channel, loop):
        machine = loop.machine
        channel.version = machine.version
        channel.loop = self
        channel.send(Welcome(machine.version, machine.migration_id, self._token(TOKEN_BYTES), machine.software))
        message = AllPlaced(loop.report or {}, loop.latencies)
        self.rules.sends(loop, message)
        channel.send(message)
        self.host.timer(RELEASE_SECONDS, channel.end.close)

    def under_way(self):
        """Return pages of which a part has come."""
        pump = None if self.current is None else self.current.pump
        return [] if pump is None else [key for receiver in pump.receivers.values() for key in receiver.run]

    # --- the guest ----------------------------------------------------------------------------------------

    def start_guest(self, loop):
        self.rules.starts(loop)
        self.guest.start(loop.memory)

    def ended(self, loop):
        """Take note of an end."""

    def _was_killed(self):
        super()._was_killed()
        if self.guest.place is not None and self.guest.place.name == "destination":
            self.guest.stop()
            self.guest_lost = True
        self.current = None
        self.known = {}

    def start_again(self):
        """Listen again, knowing nothing."""
        self.world.tell("destination", "is started again")
        self.open()
