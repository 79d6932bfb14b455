"""One story of memory that is fetched: a file, several processes, what goes wrong, and what must come of it."""

from postcopy.session.fetched import FetchedMachine
from postcopy.session.states import State
from postcopy.wire.messages import AllPlaced

from .fetch_trouble import FILE, OTHER, FetchTrouble
from .fetching import OutsideAgent, Process
from .guest import Guest, SourceMemory, layout_of
from .net import Network
from .play import told
from .rules import Rules
from .snapshot import SnapshotAgent
from .world import RuleBrokenError, World

TROUBLE_SECONDS = 30.0
CALM_SECONDS = 90.0


class FetchRules(Rules):
    """What must hold of one process: as in rules.py, but for who owns a guest, which nobody here does."""

    process = None

    def sends(self, loop, message):
        if isinstance(message, AllPlaced):
            self._complete(loop, "AllPlaced is said")

    def loops(self):
        return self.process.source, self.process.current

    def pump(self):
        return self.process.pump

    def recovers(self, loop):
        return super().recovers(loop) or isinstance(loop.machine, FetchedMachine)

    def look(self):
        if self.process.current is not None:  # nobody places anything for a process whose agent was killed
            super().look()

    def _look_at_owners(self, here, there):
        """Nobody owns a guest here."""


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
        self.trouble = FetchTrouble(world, self.network, self.source, self.agent)
        world.each_step = [self.trouble.look, *(process.rules.look for process in self.processes)]

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
        self.world.run(TROUBLE_SECONDS, lambda: not self.trouble.planned or self._all_over())
        self.world.run(min(TROUBLE_SECONDS, self.trouble.until), self._all_over)
        self.trouble.calm()
        self._attend()
        self.world.run(self.world.now + CALM_SECONDS, self._all_over)
        return self._judge()

    def _all_over(self):
        return all(one.poisoned or (one.current and one.current.finish) for one in self.processes)

    def _attend(self):
        """Be the person who has everything go on, and asks for the pages that nobody touches."""
        self.trouble.resume_all()
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
            may = state is not State.LOST or self.trouble.gave_up or process.give_up_seconds is not None
            if not may or state is State.COMPLETED:
                raise RuleBrokenError("completes", f"process {process.number} ended as {state}")
            return "lost" if state is State.LOST else "refused"
        for key in process.guest.keys:
            if process.memory.present(key) and process.memory.read(key) != process.guest.truth[key]:
                raise RuleBrokenError("nobody-waits", f"page {key} of process {process.number} is wrong at the end")
        return "resumed" if process.current.machine.reconnects else "completed"


def play(seed, *, whole=False):
    """Play one seed; return its story and how it ended. Whatever it raises has the story as its notes."""
    return told(FetchStory, seed, whole=whole, how="--fetch ")
