"""Where the other agent is dialled: where it answered last, and in turn where somebody says that it is now.

What `resume --to` says enters; the address of each attempt leaves. A wrong one costs every other attempt, and no more.
"""

from __future__ import annotations

from postcopy.link.address import Address


class Endpoint:
    """`good` is where pages travelled last. `elsewhere`: where the other agent is said to be, until it has answered."""

    def __init__(self, good: Address, elsewhere: Address | None = None) -> None:
        self.good = good
        self.elsewhere = elsewhere

    def move_to(self, address: Address) -> None:
        """Dial there, too, and there first."""
        self.elsewhere = None if address == self.good else address

    def at(self, attempts: int) -> Address:
        """Return where to dial after so many attempts that failed."""
        return self.good if self.elsewhere is None or attempts % 2 else self.elsewhere

    def answered(self, address: Address) -> None:
        """Dial where pages travel again, and nowhere else."""
        self.good, self.elsewhere = address, None
