"""`postcopy top`, as click sees it: an admin socket enters; a screen, lines or objects leave while one looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from agent.parameters import ADMIN, LIMIT

SECOND = 1.0


@click.command()
@click.option(
    "--admin", type=ADMIN, required=True, metavar="unix:PATH", help="The agent's admin socket, of either side."
)
@click.option("--interval", type=LIMIT, default=SECOND, show_default=True, metavar="SECONDS", help="Between two looks.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after so many looks.  [default: never]")
@click.option("--until-over", is_flag=True, help="End with the migration.")
@click.option("--json", "as_json", is_flag=True, help="Print an object of JSON for each look, one a line.")
def top(admin: str, interval: float, count: int | None, until_over: bool, as_json: bool) -> None:
    """Watch a migration from either side.

    What is resident, how fast pages move, how long faults and vCPUs wait: on a terminal a screen, elsewhere a line for
    each look. Ctrl-C ends it.
    """
    import uvloop  # noqa: PLC0415 - not for --help, here and below

    from agent.interrupt import Interrupted, unless_interrupted  # noqa: PLC0415

    try:
        with shown(as_json=as_json) as show:
            uvloop.run(unless_interrupted(watch(admin, interval, count, show, until_over=until_over)))
    except Interrupted as ended:
        if ended.exit_status != 130:
            raise  # Ctrl-C is how one leaves


async def watch(
    admin: str, interval: float, count: int | None, show: Callable[[dict[str, Any]], None], *, until_over: bool
) -> None:
    """Look again and again and show what is seen."""
    import asyncio  # noqa: PLC0415

    from agent.admin import admin_address, ask  # noqa: PLC0415
    from agent.top.rates import Watch  # noqa: PLC0415
    from postcopy.session.states import ENDED  # noqa: PLC0415

    address, seen, looks = admin_address(admin), Watch(), 0
    while True:
        now = seen.take(await ask(address, "look"))
        show(now)
        looks += 1
        if looks == count or (until_over and now["state"] in ENDED):
            return
        await asyncio.sleep(interval)


@contextmanager
def shown(*, as_json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what shows a look in the way that suits stdout."""
    from agent.output import print_json, writing  # noqa: PLC0415
    from agent.top import view  # noqa: PLC0415

    if as_json:
        yield print_json
    elif sys.stdout.isatty():
        import os  # noqa: PLC0415

        from rich.console import Console  # noqa: PLC0415
        from rich.live import Live  # noqa: PLC0415

        console = Console(highlight=False, no_color="NO_COLOR" in os.environ or None)
        with Live(console=console, auto_refresh=False) as live:
            yield lambda now: live.update(view.screen(now, console.height), refresh=True)
    else:

        def say(now: dict[str, Any]) -> None:
            with writing():
                sys.stdout.write(view.line(now) + "\n")

        yield say
