"""The reference, made of the commands themselves: reference.md beside this file, or manual pages with --man FOLDER.

    .venv/bin/python deploy/docs/make_reference.py

A test holds that reference.md is what the commands say; deploy/wheel makes the manual pages.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import click

from agent import commands, manual
from agent.cli import ELSEWHERE, STATUSES, cli
from agent.config import keys
from postcopy import __version__

REFERENCE = Path(__file__).parent / "reference.md"
HEAD = """# Reference

Every command with its options, as `postcopy COMMAND --help` has them. This file is made of the commands
(`.venv/bin/python deploy/docs/make_reference.py`), so it is not to be edited; an installed wheel has the same as manual
pages. How to begin is told in the [tutorial](tutorial.md).

- Sizes are typed with a unit, `256MiB`, `1G`, and rates as well, `100MiB/s`; times are seconds, `2.5`.
- Addresses are `tcp:HOST:PORT` and `unix:PATH`; an IPv6 address stands in brackets, `tcp:[::1]:7000`.
- Data goes to stdout, with `--json` as one object (or one a line) that has a `schema_version`; words go to stderr.
"""


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--man", type=Path, metavar="FOLDER", help="make manual pages there instead")
    folder = parser.parse_args().man
    if folder is None:
        REFERENCE.write_text(reference())
        return
    folder.mkdir(parents=True, exist_ok=True)
    for context in contexts():
        (folder / f"{context.command_path.replace(' ', '-')}.1").write_text(manual_page(context))


def contexts() -> Iterator[click.Context]:
    """Yield each command as it is typed, `postcopy` first."""
    commands.register(cli)
    keys.name_variables(cli)
    whole = click.Context(cli, info_name="postcopy")
    yield whole
    for name, command in manual.commands_of(cli):
        yield click.Context(command, info_name=name, parent=whole)


def reference() -> str:
    """Return all of it as one file of Markdown."""
    every = list(contexts())
    parts = [HEAD, *contents(every)]
    parts += ["## Options that are not typed, and how a command ends\n"]
    parts += [block(plain(text)) for text in (ELSEWHERE, STATUSES)]
    return "\n".join([*parts, *map(chapter, every)])


def contents(every: list[click.Context]) -> Iterator[str]:
    """Yield the commands by what they are for."""
    for title, names in manual.SECTIONS.items():
        yield f"**{title}**\n"
        for context in every[1:]:
            if context.info_name and context.info_name.split()[0] in names:
                anchor = context.command_path.replace(" ", "-")
                yield f"- [`{context.info_name}`](#{anchor}): {sentence(context)}"
        yield ""


def chapter(context: click.Context) -> str:
    """Return what one command says."""
    usage = f"{context.command_path} {' '.join(context.command.collect_usage_pieces(context))}"
    parts = [f"## {context.command_path}\n", description(context) + "\n", block(usage)]
    rows = [f"| `{cell(option)}` | {cell(text)} |" for option, text in options(context)]
    parts += ["| option | what it does |", "|---|---|", *rows, ""]
    lines = [f"# {what}\n{line}" if what else line for what, line in examples(context)]
    return "\n".join([*parts, block("\n".join(lines))])


def description(context: click.Context) -> str:
    """Return the paragraphs of a command's help, a line each."""
    paragraphs = cleandoc(context.command.help or "").split("\n\n")
    return "\n\n".join(" ".join(one.split()) for one in paragraphs)


def sentence(context: click.Context) -> str:
    """Return the first sentence of a command's help."""
    return context.command.get_short_help_str(200)


def options(context: click.Context) -> list[tuple[str, str]]:
    """Return what is typed, and what it does, of each option."""
    records = [one.get_help_record(context) for one in context.command.params if isinstance(one, click.Option)]
    return [record for record in records if record is not None]


def examples(context: click.Context) -> list[tuple[str | None, str]]:
    """Return a command's examples."""
    return manual.EXAMPLES[context.info_name or ""]


def plain(text: str) -> str:
    """Return text that click would not wrap, as it stands."""
    return text.removeprefix("\b\n")


def block(text: str) -> str:
    """Return text that is to be read as it stands."""
    return f"```text\n{text}\n```\n"


def cell(text: str) -> str:
    """Return text that fits into a table."""
    return " ".join(text.split()).replace("|", r"\|")


def manual_page(context: click.Context) -> str:
    """Return a command's page for man(1): what click-man makes of it, and what it leaves out."""
    from click_man.man import ManPage  # noqa: PLC0415 - only deploy/wheel has it

    page = ManPage(context.command_path)
    page.version = __version__
    page.short_help = sentence(context).removesuffix(".")
    page.synopsis = " ".join(context.command.collect_usage_pieces(context))
    page.description = description(context)
    page.options = [(option, " ".join(text.split())) for option, text in options(context)]
    if isinstance(context.command, manual.Sections):
        page.commands = [(one.info_name, sentence(one)) for one in list(contexts())[1:]]
    lines = [f"# {what}\n{line}" if what else line for what, line in examples(context)]
    literal = {"EXAMPLES": "\n".join(lines)}
    if context.parent is None:
        literal |= {"ENVIRONMENT AND FILES": plain(ELSEWHERE), "EXIT STATUS": plain(STATUSES)}
    return str(page) + "".join(f".SH {title}\n.nf\n{escaped(text)}\n.fi\n" for title, text in literal.items())


def escaped(text: str) -> str:
    """Return text that troff takes for nothing but text."""
    return "\n".join(rf"\&{line}" for line in text.replace("\\", r"\e").replace("-", r"\-").splitlines())


if __name__ == "__main__":
    main()
