"""`postcopy config`, as click sees it: files enter; a line for each problem leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent.parameters import json_option

if TYPE_CHECKING:
    from agent.config.keys import Keys
    from agent.config.read import Problem


@click.group()
def config() -> None:
    """Look at configuration files.

    They are TOML: a section for each command, its options as keys, and values as one would type them.
    """


@config.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE]...")
@json_option
@click.pass_context
def check(context: click.Context, files: tuple[Path, ...], as_json: bool) -> None:
    """Check files as every command does before it begins.

    Those in /etc/postcopy where none are named. Ends with 2 where something is wrong.
    """
    from agent.config.keys import sections  # noqa: PLC0415 - not for --help, here and below
    from agent.config.read import FOLDER, installed, read_file  # noqa: PLC0415
    from agent.output import print_json  # noqa: PLC0415
    from postcopy.errors import UsageError  # noqa: PLC0415

    group = context.find_root().command
    assert isinstance(group, click.Group)  # noqa: S101 - the program itself
    checked = list(files) or installed()
    if not checked:
        raise UsageError(f"there is no file {FOLDER}/*.toml: name the file to check")
    known = sections(group)
    read = {file: read_file(file, known) for file in checked}
    problems = [problem for _, found in read.values() for problem in found]
    if not problems:
        problems = together(group, checked, known)
    if as_json:
        told = [{"file": str(one.file), "line": one.line or None, "text": one.text} for one in problems]
        print_json({"schema_version": 1, "files": [str(file) for file in checked], "problems": told})
    else:
        for problem in problems:
            click.echo(str(problem))
        for file, (settings, _) in read.items():
            if not any(problem.file == file for problem in problems):
                said = ", ".join(
                    f"{len(values)} of [{name}]" if name else str(len(values)) for name, values in settings.items()
                )
                click.echo(f"{file}: right; settings: {said or 'none'}")
    if problems:
        raise SystemExit(2)


def together(group: click.Group, files: list[Path], known: Mapping[str, Keys]) -> list[Problem]:
    """Return what is wrong with the files' settings beside each other, as the daemons judge them."""
    from agent.config import origin, read  # noqa: PLC0415
    from agent.together import JUDGES  # noqa: PLC0415
    from postcopy.errors import UsageError  # noqa: PLC0415

    settings = read.defaults(read.read(files, known), known)
    root = click.Context(group)
    root.meta[origin.FILES] = files
    problems = []
    for section in JUDGES.keys() & settings.keys():
        command = group.commands[section]
        try:
            with command.make_context(section, [], root, default_map=settings[section]) as context:
                JUDGES[section](context.params)
        except (click.ClickException, UsageError) as error:
            text = error.format_message() if isinstance(error, click.ClickException) else str(error)
            problems.append(placed(text, files))
    return sorted(problems, key=lambda one: (files.index(one.file), one.line))


def placed(text: str, files: list[Path]) -> Problem:
    """Return the problem that a text is about, which begins with the file and the line where it is one of theirs."""
    from agent.config.read import Problem  # noqa: PLC0415

    for file in files:
        line, colon, rest = text.removeprefix(f"{file}:").partition(": ")
        if text.startswith(f"{file}:") and colon and line.isdecimal():
            return Problem(file, int(line), rest)
    return Problem(files[-1], 0, text)
