"""`postcopy config`, as click sees it: files enter; a line for each problem leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from agent.parameters import json_option

if TYPE_CHECKING:
    from agent.config.keys import Keys
    from agent.config.read import Problem, Settings


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

    Where none are named: those that hold here, of /etc/postcopy or --config. They are read together, so one of them
    is checked with all of them; each other file is checked by itself. What the environment says (POSTCOPY_...) counts
    with any of them, as it does for every command. Ends with 2 where something is wrong.
    """
    from agent.config.keys import sections  # noqa: PLC0415 - not for --help, here and below
    from agent.config.origin import FILES  # noqa: PLC0415
    from agent.config.read import FOLDER, installed  # noqa: PLC0415
    from agent.output import print_json  # noqa: PLC0415
    from postcopy.errors import UsageError  # noqa: PLC0415

    root = context.find_root()
    group = root.command
    assert isinstance(group, click.Group)  # noqa: S101 - the program itself
    groups = read_together(files, root.meta.get(FILES) or installed())
    if not groups:
        raise UsageError(f"there is no file {FOLDER}/*.toml: name the file to check")
    known = sections(group)
    verdicts = [verdict(group, one, known) for one in groups]
    problems = [problem for one in verdicts for problem in one.problems]
    if as_json:
        checked = [str(file) for one in verdicts for file in one.settings]
        judged = list(dict.fromkeys(section for one in verdicts for section in one.judged))
        told = [{"file": str(one.file), "line": one.line or None, "text": one.text} for one in problems]
        print_json({"schema_version": 1, "files": checked, "judged": judged, "problems": told})
    else:
        for one in verdicts:
            for line in words(one):
                click.echo(line)
    if problems:
        raise SystemExit(2)


class Verdict(NamedTuple):
    """What files say that are read together, which sections were judged as a whole, and what is wrong."""

    settings: Mapping[Path, Settings]
    judged: list[str]
    problems: list[Problem]


def read_together(named: Sequence[Path], holding: Sequence[Path]) -> list[list[Path]]:
    """Return the files to check, in groups of those that are read together, in the order in which they are read."""
    if not named:
        return [list(holding)] if holding else []
    places = {realpath(file) for file in holding}
    others = [file for file in named if realpath(file) not in places]
    held = [] if len(others) == len(named) else [list(holding)]
    return held + [[file] for file in dict.fromkeys(others)]


def verdict(group: click.Group, files: list[Path], known: Mapping[str, Keys]) -> Verdict:
    """Judge files that are read together: each by itself, and where none is wrong, as a whole."""
    from agent.config.read import read_file  # noqa: PLC0415

    read = {file: read_file(file, known) for file in files}
    settings = {file: said for file, (said, _) in read.items()}
    problems = [problem for _, found in read.values() for problem in found]
    return Verdict(settings, [], problems) if problems else Verdict(settings, *together(group, files, known))


def words(found: Verdict) -> Iterator[str]:
    """Yield a line for each problem, for each file that has none, and for what was judged beyond single values."""
    yield from map(str, found.problems)
    for file, settings in found.settings.items():
        if not any(problem.file == file for problem in found.problems):
            said = (f"{len(values)} of [{name}]" if name else str(len(values)) for name, values in settings.items())
            yield f"{file}: right; settings: {', '.join(said) or 'none'}"
    if found.judged:
        count = len(found.settings)
        files = "" if count == 1 else f" of these {count} files, in this order"
        yield f"judged as a whole: {', '.join(f'[{name}]' for name in found.judged)}{files}"
    elif found.problems:
        yield "nothing was judged as a whole: that takes files which are right by themselves"


def together(group: click.Group, files: list[Path], known: Mapping[str, Keys]) -> tuple[list[str], list[Problem]]:
    """Return the sections whose settings were judged beside each other, as their commands do, and what is wrong."""
    from agent.config import origin, read  # noqa: PLC0415
    from agent.together import JUDGES  # noqa: PLC0415
    from postcopy.errors import UsageError  # noqa: PLC0415

    settings = read.defaults(read.read(files, known), known)
    root = click.Context(group)
    root.meta[origin.FILES] = files
    problems = []
    sections = [section for section in JUDGES if section in settings]
    for section in sections:
        command = group.commands[section]
        try:
            with command.make_context(section, [], root, default_map=settings[section]) as context:
                JUDGES[section](context.params)
        except (click.ClickException, UsageError) as error:
            text = error.format_message() if isinstance(error, click.ClickException) else str(error)
            problems.append(placed(text, files))
    return sections, sorted(problems, key=lambda one: (files.index(one.file), one.line))


def placed(text: str, files: list[Path]) -> Problem:
    """Return the problem that a text is about, which begins with the file and the line where it is one of theirs."""
    from agent.config.read import Problem  # noqa: PLC0415

    for file in files:
        line, colon, rest = text.removeprefix(f"{file}:").partition(": ")
        if text.startswith(f"{file}:") and colon and line.isdecimal():
            return Problem(file, int(line), rest)
    return Problem(files[-1], 0, text)
