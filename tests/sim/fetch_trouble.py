"""What goes wrong in a story of memory that is fetched: trouble.py's, and agents that are killed and come back."""

from postcopy.link import by_hand

from .trouble import Trouble

FILE, OTHER = b"the file's bytes", b"some other bytes"
FIRST_STEP, LAST_STEP = 40, 1600


class FetchTrouble(Trouble):
    """Trouble between a source that has a file, and an agent that fetches for processes."""

    def __init__(self, world, network, source, agent):
        super().__init__(world, network, source, agent)
        self.agent = agent
        kinds = [
            *[self.cut] * 6, *[self.half_open] * 3, *[self.dark] * 2, *[self.lag] * 2, *[self.freeze] * 3, self.refuse,
            *[self.kill_source] * 4, *[self.kill_agent] * 3, *[self.by_hand] * 3, *[self.balloon] * 3,
            *([self.lose] if world.likely(0.3) else []),
        ]  # fmt: skip
        self.planned = self.plan(kinds, world.one_of((0, 1, 2, 3, 5, 8)), FIRST_STEP, LAST_STEP)
        network.lagging = world.one_of((0.0, 0.0, 0.2))
        source.evicting = world.one_of((0.0, 0.0, 0.2))

    @property
    def processes(self):
        return self.agent.processes

    def loops(self):
        """Return the fetches that have not ended."""
        return [one.current for one in self.processes if one.current is not None and not one.current.finish]

    def mute(self, end):
        for process in self.processes:
            process.rules.mute(end)

    def asked(self, loop, act):
        loop.agent.rules.asked(loop, act)

    def ballooning(self):
        """Return the guest of one of the processes."""
        return self.world.one_of(self.processes).guest

    def calm(self):
        """Let nothing go wrong any more, and have the source serve the file that it should."""
        super().calm()
        self.source.evicting = 0.0
        self.source.most = 256
        if self.source.name != FILE and self.source.host.alive:
            self.source.host.killed[1:] = []
            self.source.host.kill()
        if not self.source.host.alive:
            self.source.start_again(FILE)

    def kill_source(self):
        """End the source's agent; what is started in its place has that file, or at first another one."""
        name = FILE if self.source.name != FILE else self.world.one_of((FILE, FILE, OTHER))
        self.kill(self.source.host, lambda: self.source.start_again(name))
        if name == OTHER:
            self.planned.append((self.world.steps + 40, self.kill_source))
            self.planned.sort(key=lambda one: one[0])

    def kill_agent(self):
        """End the agent that fetches."""
        self.kill(self.agent.host, self.agent.start_again)

    def lose(self):
        """Give up what is paused."""
        for loop in self.loops():
            self.give_up(loop, "given up by the user")

    def resume_all(self):
        """Have everything go on that somebody holds, with an agent that lives."""
        if not self.agent.host.alive:
            self.agent.start_again()
        for loop in self.loops():
            if loop.machine.held and loop.machine.state in by_hand.PAUSED:
                by_hand.resume(loop)
                self.asked(loop, by_hand.resume)
