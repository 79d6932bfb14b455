"""The states of a migration as people see them, with QEMU's names; the two machines show these."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a migration stands, in QEMU's words; `lost` is ours: QEMU calls such an end `failed`."""

    NONE = "none"
    SETUP = "setup"
    DEVICE = "device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


ENDED = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED, State.LOST})
"""States that a migration never leaves."""

SWITCHED = frozenset({State.POSTCOPY_ACTIVE, State.POSTCOPY_PAUSED, State.POSTCOPY_RECOVER})
"""States in which the guest runs at the destination and pages of it are still at the source."""


class Owner(StrEnum):
    """Who may run the guest."""

    SOURCE = "source"
    DESTINATION = "destination"
    LOST = "lost"


OWNERS: dict[State, Owner] = {
    State.NONE: Owner.SOURCE,
    State.SETUP: Owner.SOURCE,
    State.DEVICE: Owner.SOURCE,
    State.FAILED: Owner.SOURCE,
    State.CANCELLED: Owner.SOURCE,
    State.POSTCOPY_ACTIVE: Owner.DESTINATION,
    State.POSTCOPY_PAUSED: Owner.DESTINATION,
    State.POSTCOPY_RECOVER: Owner.DESTINATION,
    State.COMPLETED: Owner.DESTINATION,
    State.LOST: Owner.LOST,
}
"""Who may run the guest of a migration in each state, whichever side it is that shows the state."""
