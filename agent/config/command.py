"""`postcopy config`, as click sees it: files enter; a line for each problem leaves."""

from __future__ import annotations

from pathlib import Path

import click

from agent.parameters import json_option


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
    if as_json:
        told = [{"file": str(one.file), "line": one.line or None, "text": one.text} for one in problems]
        print_json({"schema_version": 1, "files": [str(file) for file in checked], "problems": told})
    else:
        for problem in problems:
            click.echo(str(problem))
        for file, (settings, found) in read.items():
            if not found:
                said = ", ".join(
                    f"{len(values)} of [{name}]" if name else str(len(values)) for name, values in settings.items()
                )
                click.echo(f"{file}: right; settings: {said or 'none'}")
    if problems:
        raise SystemExit(2)
