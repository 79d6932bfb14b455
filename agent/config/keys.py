"""What a configuration file may say: the options of the commands, under the names that are typed.

The command line enters; sections of keys leave, and so do the variables of the environment. There is no other list:
an option that is added is a key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import click

from agent.parameters import DESCRIPTOR

TOP = ""
"""The section of what stands before any table: options of `postcopy` itself."""

FILES_VARIABLE = "POSTCOPY_CONFIG"
# Kubernetes gives such to every container beside a service of that name.
_OF_A_SERVICE = re.compile(r"_(SERVICE_HOST|SERVICE_PORT|PORT)(_|$)")

Keys = Mapping[str, click.Option]


def sections(group: click.Group) -> dict[str, Keys]:
    """Return the keys of each section: TOP, and one a command."""
    commands = {name: one for name, one in group.commands.items() if not isinstance(one, click.Group)}
    return {TOP: keys_of(group), **{name: keys_of(command) for name, command in commands.items()}}


def name_variables(group: click.Group) -> None:
    """Give each option that a file may set a variable of the environment: POSTCOPY_SECTION_KEY."""
    for section, keys in sections(group).items():
        for key, option in keys.items():
            option.envvar = "_".join(filter(None, ("postcopy", section, key))).replace("-", "_").upper()


def unknown_variables(group: click.Group, names: Iterable[str]) -> Iterator[str]:
    """Yield a line for each variable of the environment that looks like one of these and is none."""
    from agent.config.read import nearest  # noqa: PLC0415 - only where there is one

    known = {str(option.envvar) for keys in sections(group).values() for option in keys.values()} | {FILES_VARIABLE}
    for name in sorted(names):
        if name.startswith("POSTCOPY_") and name not in known and not _OF_A_SERVICE.search(name):
            yield f"the environment's {name} means nothing here{nearest(name, known, '{}')}"


def keys_of(command: click.Command) -> Keys:
    """Return a command's options by the key that sets them."""
    return {
        key_of(option): option for option in command.params if isinstance(option, click.Option) and settable(option)
    }


def settable(option: click.Option) -> bool:
    """Whether it can be said ahead: --help and its like are acts, and a descriptor is of one process."""
    return not (option.hidden or option.is_eager or option.type.name == DESCRIPTOR)


def key_of(option: click.Option) -> str:
    """Return the option's long name without its dashes."""
    return next(name for name in option.opts if name.startswith("--")).removeprefix("--")
