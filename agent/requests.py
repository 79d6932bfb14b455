"""What a daemon may be asked for, and how: a request off the admin socket enters, a command with its arguments leaves.

Handlers rely on it: an argument is there as its type, or not at all. One that nobody knows is refused, not ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from postcopy.errors import UsageError
from postcopy.limits import RATE_MAX
from postcopy.wire.records import quote


def _text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _rate(value: object) -> bool:
    return value is None or (type(value) is int and 0 <= value <= RATE_MAX)


def _seconds(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf)


# Each with what it has to be, in words.
ARGUMENTS: dict[str, tuple[Callable[[object], bool], str]] = {
    "to": (_text, "an address"),
    "timeout": (_seconds, "a number of seconds"),
    "push": (_flag, "true or false"),
    "rate": (_rate, "bytes a second"),
    "tls_dir": (lambda value: value is None or _text(value), "a path"),
    "insecure": (_flag, "true or false"),
    "lost": (_flag, "true or false"),
}


def judge(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the command and its arguments; UsageError names what makes no sense."""
    command, arguments = request.get("command"), request.get("arguments")
    if not isinstance(command, str):
        raise UsageError("a request without a command")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise UsageError(f"{quote(command)}: its arguments are no map")
    for name, value in arguments.items():
        if name not in ARGUMENTS:
            raise UsageError(f"{quote(command)}: unknown argument {quote(name)}")
        fits, wanted = ARGUMENTS[name]
        if not fits(value):
            raise UsageError(f"{quote(command)}: {name} has to be {wanted}, not {quote(value)}")
    if command == "migrate" and "to" not in arguments:
        raise UsageError("migrate: where to?")
    return command, arguments
