"""One story: a world drawn from a seed, a migration in it, trouble, and what must have become of it in the end."""

import logging

from postcopy.session.offered import OfferedMachine
from postcopy.session.states import SWITCHED, State
from postcopy.wire.version import LATENCIES_SINCE

from .destination import DestinationAgent
from .guest import Guest, SourceMemory, layout_of
from .guest_trouble import GuestTrouble
from .net import Network
from .rules import Rules
from .source import SourceAgent
from .world import RuleBrokenError, World

TROUBLE_SECONDS = 30.0
CALM_SECONDS = 150.0
PATIENCE_SECONDS = 20.0  # of a person who looks at a migration that is paused for good


class Story:
    """Everything of one seed."""

    def __init__(self, seed, *, whole=False):
        world = self.world = World(seed, whole=whole)
        delay = world.one_of((0.0001, 0.001, 0.01, 0.04))
        self.network = Network(world, delay, world.one_of((3e5, 3e6, 1e8)))
        layout = layout_of(world)
        self.guest = Guest(world, layout, world.one_of((1, 2, 4)), world.one_of((3, 10, 25)))
        part = world.one_of((0.0, 0.3, 0.9))
        holes = {key for key in self.guest.keys if world.likely(part)}
        self.rules = Rules(world)
        memory = SourceMemory(self.guest, holes)
        self.source = SourceAgent(world, self.network, self.guest, memory, self.rules)
        self.destination = DestinationAgent(world, self.network, self.guest, self.rules)
        self.rules.source, self.rules.destination = self.source, self.destination
        self._draw_settings()
        if seed % 4 == 3:
            self.destination.kind = OfferedMachine
            self.destination.hasty = [world.between(4.0, 20.0) * delay for _ in range(2)]
        self.trouble = GuestTrouble(world, self.network, self.source, self.destination, self.guest, self.rules)
        world.each_step = [self.trouble.look, self.rules.look]
        self.migrations_max = world.one_of((1, 1, 2, 3))
        self.insists = world.likely(0.6)  # once it is calm it has to work

    def _draw_settings(self):
        world, source, destination = self.world, self.source, self.destination
        source.host.turn = destination.host.turn = world.one_of((0.0004, 0.0004, 0.004, 0.02))
        source.push = world.likely(0.9)
        source.pump_is = {
            "again_max": world.one_of((4096, 65536)),
            "window": world.one_of((4096, 20_000, 200_000)),
            "extent_bytes": world.one_of((4096, 16_384, 65_536)),
        }
        destination.alias = world.likely(0.5)
        destination.takes_poison = world.likely(0.8)
        if world.likely(0.04):
            (source if world.likely(0.5) else destination).versions = (2, 2)
        if world.likely(0.04):
            source.give_up_seconds = world.between(1.0, 20.0)
        if world.likely(0.04):
            destination.give_up_seconds = world.between(1.0, 20.0)

    # --- the course ---------------------------------------------------------------------------------------

    def play(self):
        """Let it happen; RuleBrokenError where it may not."""
        self.guest.start(self.source.memory)
        self.world.after(0.01 * self.world.chance(), self.source.migrate)
        self._again()
        self.world.run(TROUBLE_SECONDS, lambda: self.trouble.spent or self._all_over())
        self.world.run(min(TROUBLE_SECONDS, self.trouble.until), self._all_over)
        self.trouble.calm()
        self._attend()
        self.world.run(self.world.now + CALM_SECONDS, self._all_over)
        return self.judge()

    def _again(self):
        """Be the person who tries once more after a migration that failed."""
        if self._goes_again():
            self.source.migrate()
        self.world.after(0.3, self._again)

    def _goes_again(self):
        source = self.source
        here = self.guest.place is source.memory and source.host.alive
        if not here or source.loop is None or source.loop.finish is None:
            return False
        wanted = source.migrations < self.migrations_max and not self.trouble.cancelled
        return self.insists if self.trouble.over else wanted

    def _attend(self):
        """Be the person who puts right what people did, and gives up what nothing can mend."""
        self.trouble.resume_all()
        here, there = self.source.loop, self.destination.current
        for loop, other in ((here, there), (there, here)):
            if loop is None or loop.finish is not None or loop.machine.state not in SWITCHED:
                continue
            alone = other is None or (other.finish is not None and other.finish.state is State.LOST)
            if alone and self.world.now - loop.machine.paused_at > PATIENCE_SECONDS:
                self.trouble.give_up(loop, "nothing can mend it")
        self.world.after(2.0, self._attend)

    def _all_over(self):
        here, there = self.source.loop, self.destination.current
        if here is None:
            nothing = there is None or there.finish is not None
            return self.source.migrations > 0 and self.source.host.alive and nothing and self.trouble.over
        if here.finish is None or (there is not None and there.finish is None):
            return False
        return not self._goes_again()

    # --- the end ------------------------------------------------------------------------------------------

    def judge(self):
        """Say in a word how it ended; RuleBrokenError where that is not as it has to be."""
        here, there = self.source.loop, self.destination.current
        if not self._all_over():
            states = [str(loop.machine.step) if loop is not None else "none" for loop in (here, there)]
            raise RuleBrokenError("completes", f"{' and '.join(states)}, long after the trouble stopped")
        ends = [loop.finish.state if loop is not None else State.NONE for loop in (here, there)]
        place = None if self.guest.place is None else self.guest.place.name
        if self.destination.guest_lost or (self.rules.run_sent and there is None and place is None):
            self._expect(place is None and ends[0] in {State.LOST, State.COMPLETED, State.NONE}, ends, place)
            return "destination died"
        if self.source.guest_gone and not self.rules.started:
            self._expect(place is None and ends[1] not in {State.COMPLETED, State.LOST}, ends, place)
            return "source died"
        if State.LOST in ends:
            return self._judge_lost(ends, place)
        if place == "source":
            self._expect(ends[0] in {State.FAILED, State.CANCELLED} and not self.rules.started, ends, place)
            self._expect(ends[1] in {State.NONE, State.FAILED, State.CANCELLED}, ends, place)
            return "at the source"
        self._expect(place == "destination" and ends[1] is State.COMPLETED, ends, place)
        # a source that was killed with nothing to go on with was not needed any more
        done = self.source.memory.released if here is not None else self.source.keeper is None
        self._expect(done and ends[0] in {State.COMPLETED, State.NONE}, ends, place)
        self._judge_latencies(here, there)
        self._judge_memory(there.memory)
        return "resumed" if there.machine.reconnects else "completed"

    @staticmethod
    def _judge_latencies(here, there):
        if here is not None and here.machine.version >= LATENCIES_SINCE and here.machine.latencies != there.latencies:
            raise RuleBrokenError("completes", "the source knows other latencies than those of the report")

    def _expect(self, holds, ends, place):
        if not holds:
            states = " and ".join(map(str, ends))
            raise RuleBrokenError("completes", f"it ended as {states}, the guest at {place}")

    def _judge_lost(self, ends, place):
        recoverable = all(loop.machine.recoverable for loop in (self.source.loop, self.destination.current) if loop)
        patient = self.source.give_up_seconds is None and self.destination.give_up_seconds is None
        may = not recoverable or not patient or self.trouble.gave_up or self.source.guest_gone
        self._expect(may and place != "source", ends, place)
        there = self.destination.current
        if there is not None and there.finish.state is State.LOST and self.destination.takes_poison and recoverable:
            self._nobody_waits()
        return "lost"

    def _nobody_waits(self):
        waiting = [(vcpu.number, vcpu.waits_for) for vcpu in self.guest.vcpus if vcpu.waits_for is not None]
        if waiting:
            raise RuleBrokenError("nobody-waits", f"vCPUs wait for pages for ever: {waiting}")

    def _judge_memory(self, memory):
        self.world.run(self.world.now + 1.0, lambda: False)
        self._nobody_waits()
        for key in self.guest.keys:
            if memory.present(key) and memory.read(key) != self.guest.truth[key]:
                raise RuleBrokenError("nobody-waits", f"page {key} is wrong at the end")


def play(seed, *, whole=False):
    """Play one seed; return its Story and how it ended. Whatever it raises has the story as its notes."""
    return told(Story, seed, whole=whole)


def told(kind, seed, *, whole, how=""):
    """Play one seed of a kind of story, which `python -m tests.sim` plays again with the option `how`; as play()."""
    log = logging.getLogger("postcopy")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)  # the story has all of it
    story = kind(seed, whole=whole)
    try:
        return story, story.play()
    except Exception as error:
        world = story.world
        error.add_note(f"seed {seed}, step {world.steps}, {world.now:.4f} s; the last events:")
        error.add_note("\n".join(world.lines()))
        error.add_note(f"the whole of it: python -m tests.sim {how}{seed}")
        raise
    finally:
        log.setLevel(before)
