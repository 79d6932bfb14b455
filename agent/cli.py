"""The command line: what users type enters, exit statuses leave.

Nothing heavy is imported before the command is known: `postcopy --help` loads neither the pumps nor the event loop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from agent import logs, manual
from agent.parameters import typed
from postcopy import __version__
from postcopy.errors import PostcopyError, UsageError
from postcopy.link.about import About, speak_of

DAEMONS = frozenset({"source", "destination"})

STATUSES = """\b
Exit status: who owns the guest.
  0        done
  1        internal error, an agent that does not answer, a page that differs
  2        the command line makes no sense, or not now
  3        this host lacks something: `postcopy doctor` says what
  4        failed before the switchover: the source runs the guest
  5        paused after the switchover: the guest runs at the destination
  6        lost after the switchover
  7        cancelled or timed out: the source runs the guest
  8        source --resume: no keeper is there to take anything from
  128 + n  ended by signal n: 130 by Ctrl-C, 143 by SIGTERM"""


ELSEWHERE = """\b
An option that is not typed is looked for in
  the environment  POSTCOPY_SOURCE_MEMORY for source --memory,
                   POSTCOPY_LOG_FORMAT for --log-format
  --config FILE    or, without one, /etc/postcopy/*.toml:
                   memory = "shmem:4GiB" below [source]"""


def load(context: click.Context, _option: click.Parameter, files: tuple[Path, ...]) -> None:
    """Have click look up in the files what is neither typed nor in the environment. What is wrong in them waits."""
    from agent.config import keys, origin, read  # noqa: PLC0415 - not for --help

    chosen = list(files) or read.installed()
    if not chosen or not isinstance(context.command, click.Group):
        return
    known = keys.sections(context.command)
    context.meta[origin.FILES] = chosen
    try:
        context.default_map = read.defaults(read.read(chosen, known), known)
    except UsageError as error:
        context.meta[__name__] = error


class EnoughRead(Exception):  # noqa: N818 - an outcome
    """Whoever reads the output has closed it. click would take the error itself for one, and end with 1."""


class Program(manual.Sections):
    """The commands and their sections; a closed pipe passes click by."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Read what was typed, which may be a wish for help; EnoughRead."""
        with told_apart():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; EnoughRead."""
        with told_apart():
            return super().invoke(ctx)


@contextlib.contextmanager
def told_apart() -> Iterator[None]:
    """Make EnoughRead of a broken pipe that is this process's output, and an error of any other."""
    try:
        yield
    except BrokenPipeError as error:
        output = select.poll()
        for stream in (1, 2):
            output.register(stream, 0)
        if any(seen & (select.POLLERR | select.POLLHUP) for _, seen in output.poll(0)):
            raise EnoughRead from error
        raise PostcopyError("internal error: a connection was closed in the middle of something") from error


@click.group(
    cls=Program,
    epilog=f"{ELSEWHERE}\n\n{STATUSES}",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="postcopy")
@click.option(
    "--config",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    envvar="POSTCOPY_CONFIG",
    is_eager=True,
    expose_value=False,
    callback=load,
    help="Read this and nothing in /etc/postcopy; what a later one says wins.",
)
@click.option(
    "--log-format",
    "form",
    type=click.Choice(logs.FORMATS),
    default="auto",
    help="Logs as lines of text or of JSON.  [default: text on a terminal, JSON elsewhere]",
)
@click.option("--debug", is_flag=True, help="Show where an error comes from, and every log line.")
@click.pass_context
def cli(context: click.Context, debug: bool, form: logs.Format) -> None:
    """Postcopy live migration of memory: a guest runs on at once, its pages follow.

    A source agent owns a running guest; a destination agent waits for one. `migrate` moves it: the guest is stopped for
    a few milliseconds, goes on at the destination on memory that is still empty, and whatever it touches is fetched
    first.
    """
    context.obj = {"debug": debug}
    logs.configure(debug=debug, form=form)
    if context.invoked_subcommand in DAEMONS:
        speak_of(About(context.invoked_subcommand))  # what is wrong from here on is said as all else of it
    if any(name.startswith("POSTCOPY_") for name in os.environ):
        from agent.config.keys import unknown_variables  # noqa: PLC0415 - not for --help

        for line in unknown_variables(cli, os.environ):
            logging.getLogger("postcopy.agent").warning("%s", line)
    if __name__ in context.meta and context.invoked_subcommand != "config":
        raise context.meta[__name__]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and end the process with its status; errors are one line on stderr."""
    from agent import commands  # noqa: PLC0415 - it adds itself to `cli`
    from agent.config import keys  # noqa: PLC0415

    commands.register(cli)
    keys.name_variables(cli)
    manual.add_examples(cli)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = cli.main(arguments, prog_name="postcopy", standalone_mode=False)
        sys.stdout.flush()  # not left to the interpreter's end, which could not say what went wrong
    except BaseException as error:
        status = status_of(error, debug="--debug" in arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done: the interpreter only cleans up
    sys.exit(status if isinstance(status, int) else 0)


def status_of(error: BaseException, *, debug: bool) -> int:
    """Say an error in one line, unless it is none, and return the exit status that goes with it."""
    match error:
        case BrokenPipeError() | EnoughRead():
            abandon_output()
            return 0
        case SystemExit(code=int(status)):
            return status
        case click.exceptions.Exit():
            return error.exit_code
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.format_message(), err=True)
            return 2
    text, status = words_of(error)
    if debug:
        traceback.print_exception(error)
    logs.last_words(" ".join(text.split()))
    return status


def words_of(error: BaseException) -> tuple[str, int]:
    """Return what to say of an error, and its exit status."""
    match error:
        case PostcopyError():
            return str(error), error.exit_status
        case click.ClickException():
            return words_of_usage(error), 2
        case click.Abort() | KeyboardInterrupt():
            return "interrupted", 130
        case OSError(strerror=reason, filename=file):
            abandon_output()
            return f"{file}: {reason}" if file else str(reason or error), 1
        case MemoryError():
            return "this host has not got enough memory", 3
        case _:
            return f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1


def words_of_usage(error: click.ClickException) -> str:
    """Return what to say of a wrong value, and where it came from if nobody typed it."""
    context, option = getattr(error, "ctx", None), getattr(error, "param", None)
    if not isinstance(error, click.BadParameter) or context is None or option is None or typed(context, option):
        return error.format_message()
    from agent.config.origin import origin  # noqa: PLC0415 - not for --help

    return f"{origin(context, option.name)}: {error.message}"


def abandon_output() -> None:
    """Drop what could not be written: at its end the interpreter would try again, and complain in its own words."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
