"""A guest's source as people and programs see it, the same whether its guest was started here, came, or was taken up.

A source enters; what `status` shows of it leaves, and how it stands.
"""

from __future__ import annotations

import os
from typing import Any

from agent import metrics
from agent.running_guest import describe_end, describe_memory
from postcopy import __version__
from postcopy.link.source import Source
from postcopy.session.states import Owner, State


def describe_source(source: Source, guest: dict[str, Any] | None = None, in_use: str = "") -> dict[str, Any]:
    """Return the answer to `status`."""
    return {
        "schema_version": 1,
        "role": "source",
        "version": __version__,
        "pid": os.getpid(),
        "state": source.state.value,
        "owner": source.owner.value,
        "in_use": in_use or None,
        "guest": guest,
        "memory": describe_memory(source.layout),
        "pages": {"total": source.layout.pages, "placed": source.placed_pages},
        "paused": source.pause_state,
        "reconnects": source.reconnects,
        "ended": describe_end(source.finish),
        "report": source.report,
    }


async def change(source: Source, arguments: dict[str, Any]) -> dict[str, Any]:
    """Do what `set` asks for: limit the push of the running migration, begin one that was left out."""
    if "rate" in arguments:
        source.set_rate(arguments["rate"])
    if arguments.get("push"):
        await source.start_push()
    return {"schema_version": 1, "state": source.state.value}


def figures_of_source(source: Source) -> metrics.Figures:
    """Return how it stands."""
    figures = metrics.Figures("source", source.state, owns_guest=source.owner is Owner.SOURCE)
    figures.downtime_seconds, figures.duration_seconds = source.downtime, source.duration
    total, left = source.layout.pages, source.layout.pages - source.placed_pages
    figures.remaining_bytes = source.layout.size * left // total if source.state is not State.LOST else 0
    return figures
