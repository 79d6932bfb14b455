"""The states of a migration as people see them, with QEMU's names; the two machines show these."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a migration stands, in QEMU's words; `lost` is ours: QEMU calls such an end `failed`."""

    NONE = "none"
    SETUP = "setup"
    DEVICE = "device"
    POSTCOPY_ACTIVE = "postcopy-active"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


ENDED = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED, State.LOST})
"""States that a migration never leaves."""


class Owner(StrEnum):
    """Who may run the guest."""

    SOURCE = "source"
    DESTINATION = "destination"
    LOST = "lost"
