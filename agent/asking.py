"""`postcopy migrate`, `status`, `check` and `set`: what one asks of an agent that runs, over its admin socket."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.parameters import ADDRESS, LIMIT, RATE, RATE_HELP, admin_option, json_option
from agent.security.options import insecure_option, tls_option
from postcopy.errors import UsageError

if TYPE_CHECKING:
    from postcopy.link.address import Address


@click.command()
@click.argument("to", type=ADDRESS, metavar="tcp:HOST:PORT|unix:PATH")
@admin_option
@click.option("--timeout", type=LIMIT, metavar="SECONDS", help="Cancel unless the switchover came by then.")
@click.option("--no-push", is_flag=True, help="Send no page that was not asked for.")
@click.option("--max-postcopy-bandwidth", "rate", type=RATE, metavar="RATE", help=RATE_HELP)
@tls_option
@insecure_option
@json_option
def migrate(to: Address, admin: str, as_json: bool, tls_dir: Path | None, **rest: Any) -> None:
    """Move an agent's guest to a destination.

    Waits for the last page and prints the report. The exit status says who owns the guest.

    Whether it is encrypted is for --tls-dir and --insecure to say, or else for the source agent's own --tls-dir.
    To a destination on this host that listens on unix:PATH the memory is handed over, and nothing of it is copied.
    """
    import uvloop  # noqa: PLC0415

    from agent.client import run_migrate  # noqa: PLC0415
    from agent.output import print_json, print_rows, progress  # noqa: PLC0415
    from agent.summary import failure, rows  # noqa: PLC0415
    from postcopy.errors import PostcopyError  # noqa: PLC0415

    arguments = {"to": str(to), "timeout": rest["timeout"], "push": not rest["no_push"], "rate": rest["rate"]}
    arguments |= {"tls_dir": str(tls_dir.absolute()) if tls_dir is not None else None, "insecure": rest["insecure"]}
    try:
        with progress("migration") as tell:
            report = uvloop.run(run_migrate(admin, arguments, tell))
    except PostcopyError as error:
        if as_json:
            print_json(failure(error))
        raise
    if as_json:
        print_json(report)
    else:
        print_rows(rows(report))


@click.command()
@admin_option
@json_option
def status(admin: str, as_json: bool) -> None:
    """Say what an agent is doing, and who owns the guest."""
    from agent.client import ask_now  # noqa: PLC0415
    from agent.output import print_json, print_rows  # noqa: PLC0415
    from agent.summary import status_rows  # noqa: PLC0415

    found = ask_now(admin, "status")
    if as_json:
        print_json(found)
    else:
        print_rows(status_rows(found))


@click.command()
@admin_option
@json_option
def check(admin: str, as_json: bool) -> None:
    """Compare every byte of the guest's memory.

    With what it must be, by the guest's seed and steps; it stands still meanwhile. Ends with 1 where a page differs.
    """
    from agent.client import ask_now  # noqa: PLC0415
    from agent.output import print_json, print_rows  # noqa: PLC0415
    from agent.summary import verdict  # noqa: PLC0415

    found = ask_now(admin, "check")
    if as_json:
        print_json(found)
    else:
        print_rows([("check", verdict(found))])
    if found["pages_mismatched"]:
        raise SystemExit(1)


@click.command("set")
@admin_option
@click.option("--max-postcopy-bandwidth", "rate", type=RATE, metavar="RATE", help=RATE_HELP)
@click.option("--push", is_flag=True, help="Begin the push of a migration that was started with --no-push.")
@json_option
def set_(admin: str, rate: int | None, push: bool, as_json: bool) -> None:
    """Change a running migration: the push, and its rate."""
    from agent.client import ask_now  # noqa: PLC0415
    from agent.output import print_json, print_rows  # noqa: PLC0415

    arguments: dict[str, Any] = {"push": True} if push else {}
    if rate is not None:
        arguments["rate"] = rate
    if not arguments:
        raise UsageError("set: nothing to set: --max-postcopy-bandwidth or --push")
    found = ask_now(admin, "set", arguments)
    if as_json:
        print_json(found)
    else:
        print_rows([("state", found["state"])])
