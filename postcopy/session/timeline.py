"""When things happened at the source, and how long that makes the downtime and its parts. All in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Timeline:
    """The source's marks of one migration; 0.0 means not yet.

    All are CLOCK_MONOTONIC readings of the source's host, but for `first_instruction_at`, which is the destination's:
    that may be compared only when both ends share a boot, and the destination sends 0.0 where they do not.
    `stopped_at` is the end of the guest's last step here, `stopped` when its state was sent.
    """

    started: float = 0.0
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
        return self._runs_at - self.stopped_at if self.running else 0.0

    @property
    def _runs_at(self) -> float:
        """The guest's first step there; where the clocks cannot be compared, when it was heard of."""
        return self.first_instruction_at if self.exact else self.running

    @property
    def total(self) -> float:
        """From the wish to migrate until every page was placed."""
        return self.all_placed - self.started if self.all_placed else 0.0

    def parts(self) -> dict[str, float]:
        """Return the downtime's parts, which add up to it; none before the guest runs there.

        stop: from the guest's last step until its state was sent; load: until Run was sent, so the state's way, the
        destination's loading and the way of Loaded; run: until the guest's first step there, with the fault on its
        page, and across hosts with the way of Running.
        """
        if not self.running:
            return {}
        return {
            "stop": self.stopped - self.stopped_at,
            "load": self.run_sent - self.stopped,
            "run": self._runs_at - self.run_sent,
        }
