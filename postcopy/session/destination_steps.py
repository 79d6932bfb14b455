"""What a destination waits for, one step after the other, as people see it, and how long it waits."""

from __future__ import annotations

from enum import StrEnum

from postcopy.limits import (
    ANSWER_SECONDS,
    DIAL_SECONDS,
    LOAD_SECONDS,
    OFFER_SECONDS,
    REDIAL_SECONDS,
    REJOIN_SECONDS,
    RELEASE_SECONDS,
    STOP_SECONDS,
)
from postcopy.session.states import State


class Step(StrEnum):
    """What the destination waits for."""

    IDLE = "idle"  # for Hello
    GREETED = "greeted"  # for LayoutOffer
    PROBING = "probing"  # for its own work
    TAKING = "taking"  # for the files of memory that is handed over
    PREPARING = "preparing"  # for its own work
    WAITING = "waiting"  # for the data connections
    ATTACHED = "attached"  # for State
    LOADING = "loading"  # for its own work
    LOADED = "loaded"  # for Run
    ACTIVE = "active"  # for the last page
    PAUSED = "paused"  # for the source to come back
    REDIALLING = "redialling"  # for a control connection, where it is the destination that dials
    REJOINING = "rejoining"  # for what the source offers, there
    RECOVERING = "recovering"  # for the data connections, with the source back
    RELOADING = "reloading"  # for the source to say what it has and that it may be asked, there
    SETTLING = "settling"  # for its own report; needs nothing more from the source
    RELEASING = "releasing"  # for Released; as before
    PROBED = "probed"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


STATES: dict[Step, State] = {
    Step.IDLE: State.NONE,
    Step.GREETED: State.SETUP,
    Step.PROBING: State.SETUP,
    Step.TAKING: State.SETUP,
    Step.PREPARING: State.SETUP,
    Step.WAITING: State.SETUP,
    Step.ATTACHED: State.SETUP,
    Step.LOADING: State.DEVICE,
    Step.LOADED: State.DEVICE,
    Step.ACTIVE: State.POSTCOPY_ACTIVE,
    Step.PAUSED: State.POSTCOPY_PAUSED,
    Step.REDIALLING: State.POSTCOPY_PAUSED,
    Step.REJOINING: State.POSTCOPY_RECOVER,
    Step.RECOVERING: State.POSTCOPY_RECOVER,
    Step.RELOADING: State.POSTCOPY_RECOVER,
    Step.SETTLING: State.COMPLETED,
    Step.RELEASING: State.COMPLETED,
    Step.PROBED: State.CANCELLED,
    Step.COMPLETED: State.COMPLETED,
    Step.FAILED: State.FAILED,
    Step.CANCELLED: State.CANCELLED,
    Step.LOST: State.LOST,
}

PATIENCE: dict[Step, float] = {
    Step.IDLE: ANSWER_SECONDS,
    Step.GREETED: OFFER_SECONDS,
    Step.TAKING: DIAL_SECONDS + ANSWER_SECONDS,
    Step.WAITING: DIAL_SECONDS + ANSWER_SECONDS,
    Step.ATTACHED: STOP_SECONDS + ANSWER_SECONDS,
    Step.LOADED: LOAD_SECONDS + ANSWER_SECONDS,
    Step.REDIALLING: REDIAL_SECONDS,
    Step.REJOINING: REJOIN_SECONDS,
    Step.RECOVERING: ANSWER_SECONDS,
    Step.RELOADING: REJOIN_SECONDS,
    Step.RELEASING: RELEASE_SECONDS,
}
"""Seconds that a step may take."""

RETURNS = (Step.REDIALLING, Step.REJOINING, Step.RECOVERING, Step.RELOADING)
"""Steps of an attempt to reconnect; of a destination that is dialled only RECOVERING."""

PAUSES = (Step.PAUSED, *RETURNS)
"""Steps of a migration whose guest runs here and gets no pages."""
