"""The command line: what users type enters, exit statuses leave.

Nothing heavy is imported before the command is known: `postcopy --help` loads neither the pumps nor the event loop.
"""

from __future__ import annotations

import sys
import traceback
from typing import NoReturn

import click

from postcopy import __version__
from postcopy.errors import PostcopyError

STATUSES = """\b
Exit status: who owns the guest.
  0  done
  1  internal error
  2  the command line makes no sense
  3  this host lacks something
  4  failed before the switchover: the source runs the guest
  6  lost after the switchover
  7  cancelled or timed out: the source runs the guest"""


@click.group(epilog=STATUSES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="postcopy")
@click.option("--debug", is_flag=True, help="Show where an error comes from, and every log line.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Postcopy live migration of memory: a guest runs on at once, its pages follow when they are touched."""
    context.obj = {"debug": debug}
    from agent import logs  # noqa: PLC0415 - see above

    logs.configure(debug=debug)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and end the process with its status; errors are one line on stderr."""
    from agent import commands  # noqa: PLC0415 - it adds itself to `cli`

    commands.register(cli)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = cli.main(arguments, prog_name="postcopy", standalone_mode=False)
    except BaseException as error:
        status = status_of(error, debug="--debug" in arguments)
    sys.exit(status if isinstance(status, int) else 0)


def status_of(error: BaseException, *, debug: bool) -> int:
    """Say an error in one line and return the exit status that goes with it."""
    match error:
        case SystemExit(code=int(status)):
            return status
        case PostcopyError():
            text, status = str(error), error.exit_status
        case click.exceptions.Exit():
            return error.exit_code
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.format_message(), err=True)
            return 2
        case click.ClickException():
            text, status = error.format_message(), 2
        case click.Abort() | KeyboardInterrupt():
            text, status = "interrupted", 130
        case BrokenPipeError():
            return 0
        case MemoryError():
            text, status = "this host has not got enough memory", 3
        case _:
            text, status = f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1
    if debug:
        traceback.print_exception(error)
    click.echo("postcopy: " + " ".join(text.split()), err=True)
    return status
