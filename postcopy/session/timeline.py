"""When things happened at the source, and how long that makes the downtime and its parts. All in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Timeline:
    """The source's marks of one migration; 0.0 means not yet.

    `stopped_at` and `first_instruction_at` are CLOCK_MONOTONIC readings of the two hosts, which may be
    compared only when both ends share a boot; the destination sends 0.0 where they do not. All others are
    the source's own `now`s.
    """

    started: float = 0.0
    stop_asked: float = 0.0
    stopped: float = 0.0
    run_sent: float = 0.0
    running: float = 0.0
    all_placed: float = 0.0
    stopped_at: float = 0.0
    first_instruction_at: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether both ends of the downtime were read from one clock."""
        return self.first_instruction_at > 0.0

    @property
    def downtime(self) -> float:
        """Last guest instruction here to the first there; across hosts longer by the way of Running."""
        if self.exact:
            return self.first_instruction_at - self.stopped_at
        return self.running - self.stopped if self.running else 0.0

    @property
    def total(self) -> float:
        """From the wish to migrate until every page was placed."""
        return self.all_placed - self.started if self.all_placed else 0.0

    def parts(self) -> dict[str, float]:
        """Return the downtime's parts as the source saw them: vCPUs parked, state to Loaded, Run to Running heard."""
        if not self.running:
            return {}
        return {
            "stop": self.stopped - self.stop_asked,
            "load": self.run_sent - self.stopped,
            "run": self.running - self.run_sent,
        }
