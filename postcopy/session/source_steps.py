"""What a source waits for, one step after the other, as people see it, and how long it waits."""

from __future__ import annotations

from enum import StrEnum

from postcopy.limits import (
    ANSWER_SECONDS,
    DIAL_SECONDS,
    LOAD_SECONDS,
    PREPARE_SECONDS,
    REDIAL_SECONDS,
    REJOIN_SECONDS,
    STOP_SECONDS,
)
from postcopy.session.states import State


class Step(StrEnum):
    """What the source waits for."""

    IDLE = "idle"
    DIALLING = "dialling"  # for the control connection
    GREETING = "greeting"  # for Welcome
    OFFERING = "offering"  # for Ready
    HANDING = "handing"  # for the files of its memory to be with the destination
    ATTACHING = "attaching"  # for the data connections
    STOPPING = "stopping"  # for the guest to stand still
    LOADING = "loading"  # for Loaded
    ACTIVE = "active"  # for AllPlaced; the right to run has passed
    PAUSED = "paused"  # for the next attempt to reconnect, or for somebody to ask for one
    REDIALLING = "redialling"  # for a control connection
    REJOINING = "rejoining"  # for what the destination has, and Ready
    REATTACHING = "reattaching"  # for the data connections
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


STATES: dict[Step, State] = {
    Step.IDLE: State.NONE,
    Step.DIALLING: State.SETUP,
    Step.GREETING: State.SETUP,
    Step.OFFERING: State.SETUP,
    Step.HANDING: State.SETUP,
    Step.ATTACHING: State.SETUP,
    Step.STOPPING: State.DEVICE,
    Step.LOADING: State.DEVICE,
    Step.ACTIVE: State.POSTCOPY_ACTIVE,
    Step.PAUSED: State.POSTCOPY_PAUSED,
    Step.REDIALLING: State.POSTCOPY_PAUSED,
    Step.REJOINING: State.POSTCOPY_RECOVER,
    Step.REATTACHING: State.POSTCOPY_RECOVER,
    Step.COMPLETED: State.COMPLETED,
    Step.FAILED: State.FAILED,
    Step.CANCELLED: State.CANCELLED,
    Step.LOST: State.LOST,
}

PATIENCE: dict[Step, float] = {
    Step.DIALLING: DIAL_SECONDS,
    Step.GREETING: ANSWER_SECONDS,
    Step.OFFERING: PREPARE_SECONDS,
    Step.HANDING: PREPARE_SECONDS,
    Step.ATTACHING: ANSWER_SECONDS,
    Step.STOPPING: STOP_SECONDS,
    Step.LOADING: LOAD_SECONDS,
    Step.REDIALLING: REDIAL_SECONDS,
    Step.REJOINING: REJOIN_SECONDS,
    Step.REATTACHING: REJOIN_SECONDS,
}
"""Seconds that a step may take."""

BEFORE_RUN = (
    *(Step.DIALLING, Step.GREETING, Step.OFFERING, Step.HANDING, Step.ATTACHING),
    *(Step.STOPPING, Step.LOADING),
)
PAUSES = (Step.PAUSED, Step.REDIALLING, Step.REJOINING, Step.REATTACHING)
"""Steps of a migration that is paused, or on its way back."""
