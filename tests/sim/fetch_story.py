"""One story of memory that is fetched: a file, several processes, what goes wrong, and what must come of it."""

import math

from postcopy.errors import UsageError
from postcopy.link import by_hand
from postcopy.pages import PageState
from postcopy.session.fetched import FetchedMachine
from postcopy.session.states import State
from postcopy.wire import residence
from postcopy.wire.messages import AllPlaced

from .fetching import OutsideAgent, Process
from .guest import Guest, SourceMemory, layout_of
from .net import Network
from .play import told
from .rules import NOTICED_SECONDS, Rules
from .snapshot import SnapshotAgent
from .trouble import FIRST_STEP, LAST_STEP, LONGEST_SECONDS
from .world import RuleBrokenError, World

FILE, OTHER = b"the file's bytes", b"some other bytes"
TROUBLE_SECONDS = 30.0
CALM_SECONDS = 90.0


class FetchRules(Rules):
    """What must hold of one process: as in rules.py, but for who owns a guest, which nobody here does."""

    process = None

    def sends(self, loop, message):
        if isinstance(message, AllPlaced):
            self._complete(loop, "AllPlaced is said")

    def let_in(self, loop, end):
        """Look at a data connection that the source lets in."""
        if self._tokens[end.connection.attempt] != loop.machine.token:
            raise RuleBrokenError("proven", f"{end.connection.name} was dialled for another attempt")

    def told(self, _loop, have):
        for begin, stop in residence.read(have).runs():
            for page in range(have.first + begin, have.first + stop):
                state = self.process.pump.ledgers[have.region][page]
                if state not in {PageState.PLACED, PageState.ZERO}:
                    raise RuleBrokenError("told", f"Have names page {(have.region, page)}: it is {state.name}")

    def mute(self, end):
        for loop in (self.process.source, self.process.current):
            if self._relies(loop, end):
                self.world.after(NOTICED_SECONDS, self._noticed, loop, end, loop.host.life, self.world.now)

    @staticmethod
    def _relies(loop, end):
        if loop is None or loop.finish is not None or loop.machine.step != "active":
            return False
        if not loop.machine.recoverable and not isinstance(loop.machine, FetchedMachine):
            return False
        lines = loop.pump.lines.values() if loop.pump is not None else ()
        return (loop.channel is not None and loop.channel.end is end) or any(line.end is end for line in lines)

    def look(self):
        pump = self.process.pump
        if self.process.current is not None and pump is not None and pump.moved:
            pump.moved = False
            self._look_at_pages(pump)
            self._look_at_faults(pump)


class FetchStory:
    """Everything of one seed."""

    def __init__(self, seed, *, whole=False):
        world = self.world = World(seed, whole=whole)
        delay = world.one_of((0.0001, 0.001, 0.01, 0.04))
        self.network = Network(world, delay, world.one_of((3e5, 3e6, 1e8)))
        self.source = SnapshotAgent(world, self.network)
        self.agent = OutsideAgent(world)
        self.source.host.turn = self.agent.host.turn = world.one_of((0.0004, 0.004, 0.02))
        self.source.files = {FILE: {}, OTHER: {}}
        self.source.name = FILE
        self.source.pump_is = {
            "again_max": world.one_of((4096, 65536)),
            "window": world.one_of((4096, 20_000, 200_000)),
            "extent_bytes": world.one_of((4096, 16_384, 65_536)),
        }
        count = world.one_of((1, 1, 2, 3))
        for number in range(count):
            self._draw_process(number)
        self.source.most = world.one_of((256, 256, count, max(1, count - 1)))
        self.over = self.gave_up = False
        self.until = 0.0
        kinds = [
            *[self.cut] * 6, *[self.half_open] * 3, *[self.dark] * 2, *[self.lag] * 2, *[self.freeze] * 3, self.refuse,
            *[self.kill_source] * 4, *[self.kill_agent] * 3, *[self.by_hand] * 3, *[self.balloon] * 3,
            *([self.lose] if world.likely(0.3) else []),
        ]  # fmt: skip
        low, high = math.log(20 * FIRST_STEP), math.log(4 * LAST_STEP)
        steps = sorted(int(math.exp(world.between(low, high))) for _ in range(world.one_of((0, 1, 2, 3, 5, 8))))
        self.planned = [(step, world.one_of(kinds)) for step in steps]
        self.network.lagging = world.one_of((0.0, 0.0, 0.2))
        self.source.evicting = world.one_of((0.0, 0.0, 0.2))
        world.each_step = [self._happen, *(process.rules.look for process in self.processes)]

    def _draw_process(self, number):
        world = self.world
        guest = Guest(world, layout_of(world), world.one_of((1, 2)), world.one_of((3, 10, 25)))
        process = Process(number, world, self.network, self.agent.host, guest, FetchRules(world))
        part = world.one_of((0.0, 0.3, 0.9))
        holes = {key for key in guest.keys if world.likely(part)}
        self.source.files[FILE][number] = SourceMemory(guest, holes)
        self.source.files[OTHER][number] = other = SourceMemory.__new__(SourceMemory)
        other.guest, other.holes, other.released = guest, set(), False
        other.pages = {key: b"\xff" * guest.sizes[key[0]] for key in guest.keys}
        process.pages = world.one_of(("all", "all", "asked-for"))
        if world.likely(0.04):
            process.give_up_seconds = world.between(1.0, 20.0)
        self.processes.append(process)

    @property
    def processes(self):
        self.source.processes = self.agent.processes
        return self.agent.processes

    # --- the course ---------------------------------------------------------------------------------------

    def play(self):
        """Let it happen; RuleBrokenError where it may not. Returns in a word how each process fared."""
        for process in self.processes:
            process.guest.start(process.memory)
            self.world.after(0.02 * self.world.chance(), process.hand_over)
        self.world.run(TROUBLE_SECONDS, lambda: not self.planned or self._all_over())
        self.world.run(min(TROUBLE_SECONDS, self.until), self._all_over)
        self._calm()
        self.world.run(self.world.now + CALM_SECONDS, self._all_over)
        return self._judge()

    def _all_over(self):
        return all(one.poisoned or (one.current and one.current.finish) for one in self.processes)

    def _happen(self):
        if self.planned and self.world.steps >= self.planned[0][0]:
            self.planned.pop(0)[1]()

    def _calm(self):
        """Let nothing go wrong any more, and have people put right what they did."""
        self.world.tell("world", "is calm from here")
        self.over, self.planned = True, []
        self.network.refusing_until = self.network.lagging = self.source.evicting = 0.0
        self.source.most = 256
        self.source.host.commands_left = self.agent.host.commands_left = None
        if self.source.name != FILE and self.source.host.alive:
            self.source.host.killed[1:] = []
            self.source.host.kill()
        if not self.source.host.alive:
            self.source.start_again(FILE)
        self._attend()

    def _attend(self):
        """Be the person who has everything go on, and asks for the pages that nobody touches."""
        if not self.agent.host.alive:
            self.agent.start_again()
        for loop in self._loops():
            if loop.machine.held and loop.machine.state in by_hand.PAUSED:
                by_hand.resume(loop)
        for process in self.processes:
            process.hand_over()
            process.pages = "all"
            if process.current is not None and not process.current.finish:
                process.current.machine.pages = "all"
                source = process.source
                if source is not None and source.machine.state is State.POSTCOPY_ACTIVE and not source.machine.pushing:
                    process.network.world.tell("somebody", "has what nobody touches fetched")
                    source.channel.end.connection.cut("to be fetched anew, all of it")
        self.world.after(2.0, self._attend)

    def _judge(self):
        self.world.run(self.world.now + 1.0, lambda: False)
        ends = []
        for process in self.processes:
            loop = process.current
            if not process.poisoned and (loop is None or not loop.finish):
                step = "none" if loop is None else loop.machine.step
                raise RuleBrokenError(
                    "completes", f"process {process.number} is {step}, long after the trouble stopped"
                )
            waiting = [(one.number, one.waits_for) for one in process.guest.vcpus if one.waits_for is not None]
            if waiting:
                raise RuleBrokenError("nobody-waits", f"vCPUs of process {process.number} wait for ever: {waiting}")
            ends.append(self._end_of(process))
        return ends

    def _end_of(self, process):
        state = process.finish.state
        if process.poisoned:
            may = state is not State.LOST or self.gave_up or process.give_up_seconds is not None
            if not may or state is State.COMPLETED:
                raise RuleBrokenError("completes", f"process {process.number} ended as {state}")
            return "lost" if state is State.LOST else "refused"
        for key in process.guest.keys:
            if process.memory.present(key) and process.memory.read(key) != process.guest.truth[key]:
                raise RuleBrokenError("nobody-waits", f"page {key} of process {process.number} is wrong at the end")
        return "resumed" if process.current.machine.reconnects else "completed"

    # --- what goes wrong ----------------------------------------------------------------------------------

    def _loops(self):
        return [one.current for one in self.processes if one.current is not None and not one.current.finish]

    def _for_a_while(self):
        seconds = math.exp(self.world.between(math.log(0.01), math.log(LONGEST_SECONDS)))
        self.until = max(self.until, self.world.now + seconds)
        return seconds

    def cut(self):
        """Break connections: one, or all."""
        connections = self.network.open()
        if connections and self.world.likely(0.5):
            connections = [self.world.one_of(connections)]
        for connection in connections:
            connection.cut("cut")

    def half_open(self):
        """Have a connection swallow what it is given."""
        if connections := self.network.open():
            connection = self.world.one_of(connections)
            connection.silence(self.world.likely(0.3))
            for end in (connection.here, connection.there):
                if end.peer.out.mute:
                    self._mute(end)

    def _mute(self, end):
        for process in self.processes:
            process.rules.mute(end)

    def dark(self):
        """Let nothing through for a while, and deliver it late."""
        seconds = self._for_a_while()
        self.network.partition(seconds)
        if seconds > NOTICED_SECONDS:
            for connection in self.network.connections:
                self._mute(connection.here)
                self._mute(connection.there)

    def lag(self):
        """Have one connection come behind all others."""
        if connections := self.network.open():
            self.world.one_of(connections).hold(self.world.now + self._for_a_while() / 4)

    def refuse(self):
        """Have nobody listen for a while."""
        self.network.refusing_until = self.world.now + self._for_a_while()

    def freeze(self):
        """Stop a process for a while."""
        self.world.one_of((self.source.host, self.agent.host)).freeze(self._for_a_while())

    def kill_source(self):
        """End the source's agent; what is started in its place has that file, or at first another one."""
        name = FILE if self.source.name != FILE else self.world.one_of((FILE, FILE, OTHER))
        self._kill(self.source.host, lambda: self.source.host.alive or self.source.start_again(name))
        if name == OTHER:
            self.planned.append((self.world.steps + 40, self.kill_source))
            self.planned.sort(key=lambda one: one[0])

    def kill_agent(self):
        """End the agent that fetches."""
        self._kill(self.agent.host, lambda: self.agent.host.alive or self.agent.start_again())

    def _kill(self, host, start_again):
        if not host.alive:
            return
        host.killed[1:] = [lambda: self.world.after(self._for_a_while(), start_again)]
        if self.world.likely(0.5):
            host.commands_left = self.world.below(12)
        else:
            host.kill()

    def by_hand(self):
        """Pause, or resume what is paused."""
        for loop in self._loops():
            act = self.world.one_of((by_hand.pause, by_hand.resume, None))
            try:
                if act is not None:
                    act(loop)
            except UsageError:
                pass

    def lose(self):
        """Give up what is paused."""
        for loop in self._loops():
            try:
                by_hand.lose(loop, "given up by the user")
                self.gave_up = True
            except UsageError:
                pass

    def balloon(self):
        """Have a process give pages back, and again after a while."""
        guest = self.world.one_of(self.processes).guest
        first = self.world.below(len(guest.keys))
        guest.place.remove(guest.keys[first : first + 1 + self.world.below(6)])
        if not self.over and self.world.likely(0.6):
            self.world.after(0.01 * self.world.chance(), self.balloon)


def play(seed, *, whole=False):
    """Play one seed; return its story and how it ended. Whatever it raises has the story as its notes."""
    return told(FetchStory, seed, whole=whole, how="--fetch ")
