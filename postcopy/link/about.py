"""Whom a line of the log is about: the role that an agent plays, and its migration, in whatever task the line is said.

A formatter that wants to tell asks `about()`; loggers and their messages need not know.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class About:
    """`role` is "source" or "destination", "" for neither; `migration` its id in hex, "" before there is one."""

    role: str = ""
    migration: str = ""


_NOBODY = About()
_about: ContextVar[About] = ContextVar("about")


def about() -> About:
    """Return whom this task works for."""
    return _about.get(_NOBODY)


def speak_of(whom: About) -> None:
    """Have this task, and all that it starts from now on, speak of `whom`; what is learnt of it later is told, too."""
    _about.set(whom)
