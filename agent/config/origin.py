"""Where the value of an option came from: what has to be changed where the value turns out to be wrong.

A click context and the name of a parameter enter; the flag, the variable of the environment, or the line of a file
and the key leave. Nothing is read before something is wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from agent.config.keys import TOP, key_of
from agent.config.read import lines_of
from postcopy.errors import HostError, PostcopyError, UsageError

FILES = "postcopy.config.files"


@contextlib.contextmanager
def named(name: str, *errors: type[PostcopyError]) -> Iterator[None]:
    """Have the errors that come out of a block say where the value came from that they are about.

    `name` is the parameter's; `errors` are UsageError and HostError where none are given.
    """
    about = errors or (UsageError, HostError)
    try:
        yield
    except about as error:
        context = click.get_current_context(silent=True)
        if context is not None:
            error.args = (f"{origin(context, name)}: {error}",)
        raise


def origin(context: click.Context, name: str) -> str:
    """Return what to change for another value of a parameter."""
    option = next(one for one in context.command.params if one.name == name)
    if not isinstance(option, click.Option):
        return option.make_metavar(context)
    key = key_of(option)
    source = context.get_parameter_source(name)
    if source is ParameterSource.ENVIRONMENT and option.envvar:
        return str(option.envvar)
    if source is ParameterSource.DEFAULT_MAP:
        section = TOP if context.parent is None else context.command.name or TOP
        place = said_in(context.find_root().meta.get(FILES, ()), section, key)
        return f"{place}: {key}" if place else key
    return f"--{key}"


def said_in(files: Sequence[Path], section: str, key: str) -> str:
    """Return the file and the line that count for a key: of those that say it, the last one."""
    for file in reversed(files):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            line = lines_of(file.read_text(encoding="utf-8").removeprefix("\ufeff")).get((section, key))
            if line is not None:
                return f"{file}:{line}"
    return ""
