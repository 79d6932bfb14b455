"""Help that one can work from: sections, examples that the command line would take, options that say what they are."""

import re
import shlex
import subprocess
import sys

import click
import pytest

from agent import commands, manual
from agent.cli import cli
from agent.config import keys

from .agents import ENVIRONMENT, run

commands.register(cli)
keys.name_variables(cli)
manual.add_examples(cli)
COMMANDS = dict(manual.commands_of(cli))
WORDS_OF_CLICK = {"TEXT", "INTEGER", "FLOAT", "INTEGER RANGE", "FLOAT RANGE", "PATH", "BOOLEAN"}
UNITS = {"size": "SIZE", "rate": "RATE", "seconds": "SECONDS", "days": "DAYS"}


def options_of(command):
    return [one for one in command.params if isinstance(one, click.Option) and not one.hidden]


def help_of(name):
    """Return the help of a command as 80 columns show it."""
    return run(*name.split(), "--help").out


def test_every_command_is_in_one_section():
    named = [name for names in manual.SECTIONS.values() for name in names]
    assert sorted(named) == sorted(cli.commands)
    assert set(manual.EXAMPLES) == {"postcopy", *COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_default_and_every_range_is_shown(name):
    command = COMMANDS[name]
    for option in options_of(command):
        said = option.get_help_record(click.Context(command))[1]
        value = option.get_default(click.Context(command))
        assert option.is_flag or value == () or option.value_is_missing(value) or "default: " in said, option.name
    # Of whole numbers there are no others but descriptors, which are looked at themselves.
    numbers = [one for one in options_of(command) if one.type.name in {"integer", "float"}]
    assert [one.name for one in numbers] == []


def test_the_list_of_commands_cuts_no_sentence_off():
    said = help_of("")
    assert [title for title in manual.SECTIONS if f"\n{title}:\n" not in said] == []
    assert "..." not in said.partition("Try it:")[2].partition("Examples:")[0]
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize(
    ("name", "line"), [(name, line) for name in manual.EXAMPLES for _, line in manual.EXAMPLES[name]]
)
def test_an_example_is_a_command_that_would_be_taken(name, line, tmp_path, monkeypatch):
    """As click reads it: every option is one, and takes what is given to it."""
    monkeypatch.chdir(tmp_path)
    program, *typed = shlex.split(line.partition(" >")[0])
    assert program == "postcopy"
    context, command = click.Context(cli), cli
    while isinstance(command, click.Group):
        chosen, command, typed = command.resolve_command(context, typed)
        assert command is not None, chosen
    assert "--help" in typed or command.make_context(line, typed)
    assert name in {"postcopy", *re.findall(r"^postcopy ([a-z]+(?: check)?)", line)}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_say_what_they_are_and_in_which_unit(name):
    context = click.Context(COMMANDS[name])
    for option in options_of(COMMANDS[name]):
        assert option.help, option.name
        assert option.help.endswith((".", "]", "?")), (option.name, option.help)
        if not option.is_flag:
            shown = option.make_metavar(context)
            assert shown not in WORDS_OF_CLICK, (option.name, shown)
            assert shown == UNITS.get(option.type.name, shown)
    for argument in COMMANDS[name].params:
        if isinstance(argument, click.Argument):
            assert argument.make_metavar(context) not in WORDS_OF_CLICK


def test_the_same_option_has_the_same_value_everywhere():
    shown = {}
    for name, command in COMMANDS.items():
        for option in options_of(command):
            if not option.is_flag and option.name not in {"memory", "admin", "handover", "listen"}:
                shown.setdefault(option.opts[-1], {})[name] = option.make_metavar(click.Context(command))
    assert {option: where for option, where in shown.items() if len(set(where.values())) > 1} == {}


@pytest.mark.parametrize("name", ["demo", "config check"])
def test_help_shows_its_examples(name):
    said = help_of(name)
    for what, line in manual.EXAMPLES[name]:
        assert f"    # {what}\n    {line}\n" in said


def test_options_are_grouped_and_none_is_left_out():
    said = help_of("source")
    for title in ("Options", *manual.OPTIONS):
        assert f"\n{title}:\n" in said
    for option in options_of(COMMANDS["source"]):
        assert len(re.findall(rf"^  (?:-\w, )?{option.opts[-1]}(?=\s)", said, re.MULTILINE)) == 1, option.opts
    known = {one.name for command in COMMANDS.values() for one in command.params}
    assert set().union(*manual.OPTIONS.values()) <= known


def test_a_shell_can_complete_commands_and_options():
    environment = {**ENVIRONMENT, "COMP_WORDS": "postcopy migrate --t", "COMP_CWORD": "2"}
    asked = [sys.executable, "-m", "agent"]
    done = subprocess.run(
        asked, env={**environment, "_POSTCOPY_COMPLETE": "bash_complete"}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["plain,--timeout", "plain,--tls-dir"]
