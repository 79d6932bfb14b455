"""Processes that handed their memory over, and the agent that fetches it for them; what --keep keeps outlives it.

It does what `guest/outside/session.py` and `serving.py` do, with a model of the pump and of the network.
"""

from postcopy.errors import LinkError
from postcopy.limits import MIGRATION_ID_BYTES, PROGRESS_SECONDS, TOKEN_BYTES
from postcopy.pages import PageState
from postcopy.session import fetching
from postcopy.session.events import Connected, ControlLost, DataAttached, DialFailed, GuestRunning, Prepared
from postcopy.session.fetching import FetchingMachine
from postcopy.session.states import State
from postcopy.wire.messages import Piece
from postcopy.wire.preamble import ACCEPTED, Preamble, Role, pack
from postcopy.wire.version import FETCH_SINCE

from .destination import DestinationLoop
from .destination_pump import DestinationPump
from .loop import Channel
from .memory import DestinationMemory
from .snapshot import PIECE
from .world import Host

ROLES = {"urgent": Role.URGENT, "push": Role.PUSH}
HERE = {PageState.PLACED: PageState.PLACED, PageState.ZERO: PageState.ZERO, PageState.DROPPED: PageState.ZERO}


class FetchingLoop(DestinationLoop):
    """Performs the commands of a destination that dials, for one process."""

    def __init__(self, process, machine):
        self._dial = lambda: None  # gives up dialling
        super().__init__(process, machine)

    # --- dialling -----------------------------------------------------------------------------------------

    async def do_Connect(self, _command):  # noqa: N802
        self.dial_control(again=True)

    def dial_control(self, *, again):
        """Dial the source; the first time what fails is the end."""

        def made(end):
            end.send(pack(Preamble(Role.FETCH, FETCH_SINCE)))
            channel = Channel(end, "source")
            self.listen(channel)
            if again:
                self.post(Connected(self.now(), self.agent.token(TOKEN_BYTES)), channel)

        def refused(why):
            failed = DialFailed(self.now(), why)
            self.post(failed if again else ControlLost(self.now(), why))

        self._dial = self.agent.network.dial(self.host, "fetch", None, made, refused)

    async def do_DialData(self, _command):  # noqa: N802
        self._dial_roles(self._take, lambda why: self.post(DialFailed(self.now(), why)))

    def _dial_roles(self, done, failed):
        self.agent.attempts += 1
        attempt = {"wanted": True, "ends": {}}
        self.agent.rules.dials(self.agent.attempts, self.machine.token)
        self._dial = lambda: self._call_off(attempt)
        self._dial_role(attempt, self.agent.attempts, ["urgent", "push"], done, failed)

    @staticmethod
    def _call_off(attempt):
        if attempt["wanted"]:
            attempt["wanted"] = False
            for end in attempt["ends"].values():
                end.close()

    def _dial_role(self, attempt, number, roles, done, failed):
        if not attempt["wanted"]:
            return
        if not roles:
            attempt["wanted"] = False
            done(attempt["ends"])
            return
        role, machine = roles[0], self.machine

        def made(end):
            if not attempt["wanted"]:
                end.close()
                return
            attempt["ends"][role] = end
            end.send(pack(Preamble(ROLES[role], machine.version, machine.migration_id, machine.token)))
            end.listen(answered, lambda why, _broken: refused(why))

        def answered(data):
            end = attempt["ends"][role]
            if attempt["wanted"] and data[:1] == ACCEPTED:
                end.listen(None, None)
                end.unread += data[1:]
                self._dial_role(attempt, number, roles[1:], done, failed)
            else:
                refused("other bytes than the one that accepts it")

        def refused(why):
            if attempt["wanted"]:
                self._call_off(attempt)
                failed(f"{role} connection: {why}")

        self.agent.network.dial(self.host, role, number, made, refused)

    def _take(self, ends):
        for role, end in ends.items():
            self.pump.attach(role, end)
            self.post(DataAttached(self.now(), role, self.machine.token))

    async def _drop_control(self, _command):
        self._dial()
        self._leave_channel()

    # --- the memory is the process's ----------------------------------------------------------------------

    async def do_Prepare(self, _command):  # noqa: N802
        self._make_room()

        def done(ends):
            self.post(Prepared(self.now()))
            self._take(ends)

        self._dial_roles(done, lambda why: self._tell_failure(LinkError(why), "work"))

    def _make_room(self):
        self.memory = self.agent.memory
        self.pump = DestinationPump(self.host, self.agent.layout, self.memory, alias=False, beats=True)
        self.pump.woke = self.pump_woke
        self.agent.pump = self.pump

    async def do_StartPump(self, _command):  # noqa: N802
        pass  # faults wait already, and the source may not be asked before RUN

    async def do_StartGuest(self, _command):  # noqa: N802
        machine = self.machine
        self.agent.migration = (machine.version, machine.migration_id, machine.memory, machine.held)
        self._serve()

    async def do_KeepRecord(self, _command):  # noqa: N802
        if self.agent.migration is not None:
            *known, _held = self.agent.migration
            self.agent.migration = (*known, self.machine.held)

    async def _step(self, event):
        self.agent.rules.handles(self, event)
        await super()._step(event)
        self.agent.rules.handled(self, event)

    def _serve(self):
        self.pump.start()
        self.pump._look_soon()
        self._watched = True
        self._told_running = True
        self.guest_here = True
        self.post(GuestRunning(self.now(), 0.0))
        self.host.timer(PROGRESS_SECONDS, self._progress)

    def take_up(self, states):
        """Serve with what a killed agent knew, until the source is found again; whoever waits faults anew."""
        self._make_room()
        for ledger, known in zip(self.pump.ledgers, states, strict=True):
            for page, state in enumerate(known):
                ledger._states[page] = HERE.get(PageState(state), PageState.ABSENT)
            self.pump.resident += ledger.pages - ledger.count(PageState.ABSENT)
        self.pump.alone = True
        self.pump.watch()
        self._serve()
        self.wake_all()
        if self.pump.resident == self.pump.total:
            self.pump.state = "complete"
            self.pump_woke()

    def wake_all(self):
        """Have whoever waits fault anew: what was told to another agent is not told again."""
        for key in list(self.memory.waiting):
            self.memory.wake(key)

    async def do_Settle(self, _command):  # noqa: N802
        self.agent.rules.settles(self)
        self._sum_up()

    async def do_StopPump(self, _command):  # noqa: N802
        pass  # it goes on, for pages that are given back

    async def do_Poison(self, _command):  # noqa: N802
        pass  # Process.poison does it, once the end is known

    async def do_Discard(self, _command):  # noqa: N802
        self._dial()

    def ended(self):
        self._dial()
        self.agent.ended(self)


class ForeignMemory(DestinationMemory):
    """Memory that is left to the kernel in the end: what is poisoned stays that."""

    def present(self, key):
        return key not in self.poisoned and super().present(key)


class Process:
    """A process that handed its memory over: to its loop it is the agent, with room for one guest that runs already."""

    alias, failing, takes_poison, at_the_door = False, 0.0, True, None

    def __init__(self, number, world, network, host, guest, rules):
        self.number = number
        self.world = world
        self.network = network
        self.host = host
        self.guest = guest
        self.layout = guest.layout
        self.rules = rules
        self.memory = ForeignMemory(guest)
        self.pump = self.current = self.source = None
        self.finish = None  # the latest end
        self.migration = None
        self.attempts = 0
        self.poisoned = False
        self.pages = "all"
        self.give_up_seconds = None
        self._drawn = 0
        rules.process = self

    def token(self, size):
        self._drawn += 1
        return (self.number << 32 | self._drawn).to_bytes(size, "big")

    @property
    def pieces(self):
        at, pieces = self.number * PIECE, []
        for region in self.layout.regions:
            pieces.append(Piece(at, region.size, region.page_size))
            at += region.size + -region.size % 8192  # each begins where a page of any size may
        return tuple(pieces)

    def hand_over(self):
        """Begin to fetch."""
        if not self.host.alive or self.current is not None or self.poisoned:
            return
        self._loop(self.token(MIGRATION_ID_BYTES)).dial_control(again=False)

    def _loop(self, migration_id):
        machine = FetchingMachine(
            (FETCH_SINCE, FETCH_SINCE), (migration_id, self.token(TOKEN_BYTES)), "sim", "boot", self.world.now,
            pieces=self.pieces, pages=self.pages, give_up_seconds=self.give_up_seconds,
        )  # fmt: skip
        self.current = FetchingLoop(self, machine)
        self.current.begin()
        return self.current

    def ended(self, loop):
        """End memory that never comes."""
        self.finish = loop.finish
        if loop.finish.state is not State.COMPLETED:
            self.poison()

    def poison(self):
        """Have whoever touches what is not here get SIGBUS."""
        self.poisoned = True
        pump, memory = self.pump, self.memory
        if pump is None:
            memory.poison([key for key in self.guest.keys if key not in memory.file])
        else:
            pump.read_messages()
            pump.stop()
            pump.poison()
        memory.trap_no_more()

    def was_killed(self):
        """Keep what the page maps say, and no more."""
        self.memory.on_message = None
        self.current = None

    def start_again(self):
        """Be served by the next agent."""
        if self.poisoned:
            return
        states = None if self.pump is None else [ledger.to_bytes() for ledger in self.pump.ledgers]
        if self.migration is None:
            self.pump = None
            self.hand_over()
            return
        version, migration_id, memory, held = self.migration
        loop = self._loop(migration_id)
        fetching.take_up(loop.machine, self.world.now, version, memory, held=held)
        self.rules.takes_up(loop)
        loop.take_up(states)


class OutsideAgent:
    """The process that serves all of them."""

    def __init__(self, world):
        self.world = world
        self.host = Host(world, "destination")
        self.host.killed.append(self._was_killed)
        self.processes = []

    def _was_killed(self):
        for process in self.processes:
            process.was_killed()

    def start_again(self):
        """Take the place of the one that was killed."""
        self.world.tell("destination", "is started again")
        self.host.alive = True
        for process in self.processes:
            process.start_again()
