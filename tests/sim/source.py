"""The source's agent: the commands of its machine, and a process that can be killed and started again.

It does what `link/source_interpreter.py` and `link/source.py` do, with a model of the pump and of the network. What
outlives it is its memory and the Record that link's own `keeping` packs and unpacks.
"""

import msgpack

from postcopy.errors import HostError, LinkError
from postcopy.limits import PROGRESS_SECONDS
from postcopy.link.keeping import Record
from postcopy.link.residence import Residence
from postcopy.session import commands as does
from postcopy.session.events import (
    AliveDue,
    Connected,
    DataConnected,
    GuestStopped,
    PumpBroken,
    Started,
)
from postcopy.session.source import SourceMachine
from postcopy.session.source_recovery import take_up
from postcopy.wire.control import GuestOffer, Hello, LayoutOffer
from postcopy.wire.preamble import ACCEPTED, Preamble, Role, pack
from postcopy.wire.version import VERSION_MIN

from .loop import Channel, Loop
from .source_pump import SourcePump
from .world import Host

ROLES = {"urgent": Role.URGENT, "push": Role.PUSH}


class SourceLoop(Loop):
    """Performs the source's commands."""

    def __init__(self, agent, machine):
        self.agent = agent
        self.pump = None
        self._residence = None
        self._dial = lambda: None  # gives up dialling
        self._data_dial = lambda: None
        self._saying_alive = False
        self._state = b""
        self._guest_stopped = False
        super().__init__("source", machine, agent.host)

    def performers(self):
        return {getattr(does, name[3:]): getattr(self, name) for name in dir(self) if name.startswith("do_")}

    # --- control ------------------------------------------------------------------------------------------

    async def do_Connect(self, _command):  # noqa: N802
        self._residence = Residence(self.agent.layout)
        self._dial()
        self._dial = self.agent.network.dial(self.host, "control", None, self._control_made, self._control_refused)

    def _control_made(self, end):
        end.send(pack(Preamble(Role.CONTROL, VERSION_MIN)))
        channel = Channel(end, "destination")
        channel.version = self.machine.version or channel.version
        self.listen(channel)
        self.post(Connected(self.now()), channel)

    def _control_refused(self, why):
        self._tell_failure(LinkError(f"cannot connect: {why}"), "work")

    async def _drop_control(self, command):
        self._dial()
        await super()._drop_control(command)

    async def do_NoteResidence(self, command):  # noqa: N802
        self.agent.rules.told(self, command.have)
        self._residence.add(command.have)

    # --- data ---------------------------------------------------------------------------------------------

    async def do_DialData(self, command):  # noqa: N802
        pump = self.pump = SourcePump(
            self.host, self.agent.layout, self.agent.memory, beats=self.machine.recoverable, **self.agent.pump_is
        )
        pump.woke = lambda: self.pump_woke(pump)
        self._residence.skip_in(pump)
        self.agent.rules.skipped(pump)
        attempt = {"wanted": True}
        self._data_dial = lambda: self._call_off(attempt)
        self.agent.attempts += 1
        self.agent.rules.dials(self.agent.attempts, command.token)
        self._dial_role(pump, command, attempt, self.agent.attempts, ["urgent", "push"])

    @staticmethod
    def _call_off(attempt):
        attempt["wanted"] = False
        if "end" in attempt:
            attempt["end"].close()

    def _dial_role(self, pump, command, attempt, number, roles):
        if not attempt["wanted"]:
            return
        if not roles:
            self.post(DataConnected(self.now()))
            return
        role = roles[0]

        def made(end):
            if not attempt["wanted"]:
                end.close()
                return
            end.send(pack(Preamble(ROLES[role], self.machine.version, command.migration_id, command.token)))
            end.listen(lambda data: answered(end, data), lambda why, _: refused(why, end))
            attempt["end"] = end

        def answered(end, data):
            if not attempt["wanted"]:
                end.close()
            elif data[:1] == ACCEPTED:
                end.listen(None, None)
                end.unread += data[1:]
                del attempt["end"]
                pump.attach(role, end)
                self._dial_role(pump, command, attempt, number, roles[1:])
            else:
                refused("other bytes than the one that accepts it", end)

        def refused(why, end=None):
            if end is not None:
                end.close()
            if attempt["wanted"]:
                attempt["wanted"] = False
                self._tell_failure(LinkError(f"{role} connection: {why}"), "work")

        self.agent.network.dial(self.host, role, number, made, refused)

    async def do_StartPump(self, _command):  # noqa: N802
        if self.pump is not None:
            self.pump.start()

    def pump_woke(self, pump):
        """Hear of the pump that a connection is over."""
        if pump is self.pump and pump.broken is not None:
            self.post(PumpBroken(self.now(), pump.broken))

    async def do_WatchData(self, _command):  # noqa: N802
        if self.pump is not None:
            self.pump.watch()
        if not self._saying_alive:
            self._saying_alive = True
            self.host.timer(PROGRESS_SECONDS, self._say_alive)

    def _say_alive(self):
        if self.finish is None:
            self.post(AliveDue(self.now()))
            self.host.timer(PROGRESS_SECONDS, self._say_alive)

    async def do_StartPush(self, _command):  # noqa: N802
        if self.pump is not None:
            self.pump.push()

    async def do_StopPump(self, _command):  # noqa: N802
        self._data_dial()
        if self.pump is not None:
            self.pump.stop()
            self.pump = None

    # --- the guest ----------------------------------------------------------------------------------------

    async def do_StopGuest(self, _command):  # noqa: N802
        world = self.world
        if world.likely(self.agent.failing):
            self.work(0.01 * world.chance(), self._fail, "a vCPU does not park")
        else:
            self.host.after(0.003 * world.chance(), self._stopped)

    def _fail(self, text):
        raise HostError(text)

    def _stopped(self):
        if self._guest_stopped or self.finish is not None:
            return
        self.agent.stop_guest()
        self._guest_stopped = True
        self._state = msgpack.packb({"vcpus": 1})
        self.post(GuestStopped(self.now(), self._state, self.now(), "boot"))

    async def do_KeepRecord(self, _command):  # noqa: N802
        machine, when = self.machine, self.machine.timeline
        self.agent.keeper = Record(
            version=machine.version,
            migration_id=machine.migration_id,
            token=machine.first_token,
            address="tcp:destination:1",
            elsewhere="",
            regions=tuple((region.type, region.page_size, region.size) for region in self.agent.layout.regions),
            guest=("emulated", 1),
            tls=False,
            state=self._state,
            push=machine.push or machine.pushing,
            held=machine.held,
            rate=None,
            started=when.started,
            stopped=when.stopped,
            stopped_at=when.stopped_at,
            run_sent=when.run_sent,
        ).pack()

    async def _step(self, event):
        self.agent.rules.handles(self, event)
        await super()._step(event)
        self.agent.rules.handled(self, event)

    async def do_ResumeGuest(self, _command):  # noqa: N802
        self._guest_stopped = True  # what is about to stop it has lost its say
        self.agent.keeper = None
        self.agent.resume_guest()

    async def do_ReleaseMemory(self, _command):  # noqa: N802
        self.agent.release()

    async def _send(self, command):
        self.agent.rules.sends(self, command.message)
        await super()._send(command)

    def ended(self):
        self._dial()
        self._data_dial()
        self.agent.ended(self)


class SourceAgent:
    """The process of the source, its guest and what is kept for the case that it is killed."""

    def __init__(self, world, network, guest, memory, rules):
        self.world = world
        self.host = Host(world, "source")
        self.host.killed.append(self._was_killed)
        self.network = network
        self.guest = guest
        self.memory = memory
        self.layout = guest.layout
        self.rules = rules
        self.loop = None
        self.keeper = None
        self.attempts = 0  # at data connections
        self.migrations = 0
        self.failing = 0.0  # how often this host's work fails
        self.versions = (2, 3)
        self.push = True
        self.give_up_seconds = None
        self.pump_is = {}
        self.guest_gone = False

    def migrate(self):
        """Begin a migration."""
        self.migrations += 1
        self.rules.new_migration()
        offer = LayoutOffer.of(self.layout, GuestOffer("emulated", len(self.guest.vcpus)))
        machine = SourceMachine(
            Hello(self.versions, "sim"), offer, push=self.push, give_up_seconds=self.give_up_seconds
        )
        self.loop = SourceLoop(self, machine)
        self.loop.post(Started(self.world.now))

    def stop_guest(self):
        self.guest.stop()

    def resume_guest(self):
        self.rules.goes_back()
        if self.guest.place is None:
            self.guest.start(self.memory)

    def release(self):
        self.rules.releases()
        self.keeper = None
        self.memory.released = True

    def ended(self, loop):
        """Take note of an end."""

    # --- killed and started again -------------------------------------------------------------------------

    def _was_killed(self):
        if self.guest.place is self.memory:
            self.guest.stop()
        if self.keeper is None and not self.memory.released:
            self.guest_gone = True
        self.loop = None

    def start_again(self):
        """Take the place of the agent that was killed, if there is anything to go on with."""
        self.host.alive = True
        if self.keeper is None:
            return
        self.world.tell("source", "is started again")
        record = Record.unpack(self.keeper)
        offer = LayoutOffer.of(self.layout, GuestOffer(*record.guest))
        machine = SourceMachine(
            Hello(self.versions, "sim"), offer, push=record.push, give_up_seconds=self.give_up_seconds
        )
        identity = (record.version, record.migration_id, record.token)
        take_up(machine, self.world.now, *identity, held=record.held)
        self.loop = SourceLoop(self, machine)
        self.loop._guest_stopped = True
        self.loop._state = record.state
        self.rules.takes_up(self.loop)
        self.loop.begin()
