"""`postcopy bench`, as click sees it: which scenarios, how long, on what; a table or one object of JSON leaves."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.parameters import json_option

if TYPE_CHECKING:
    from agent.bench.runner import Tell

PAIRS = 5
QUICK_PAIRS = 2
# Of the sixty seconds that --quick may take: no pair is begun that would end later.
QUICK_SECONDS = 52.0
# A table wants room; a pipe has no width of its own.
PIPE_COLUMNS = 200


@click.command()
@click.argument("scenarios", nargs=-1, metavar="[SCENARIO]...")
@click.option("--quick", is_flag=True, help="Fewer and smaller scenarios, done within a minute.")
@click.option("--tls", is_flag=True, help="What encryption costs: the scenarios tls/*, plain and encrypted in turns.")
@click.option(
    "--pairs", type=click.IntRange(1, 1000), metavar="N", help="Runs of product and floor in turns.  [default: 5]"
)
@click.option("--list", "list_only", is_flag=True, help="Name the scenarios and end.")
@click.option(
    "--compare",
    "earlier",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Say what changed since this earlier --json.",
)
@click.option("--reserve-huge-pages", is_flag=True, help="Reserve them meanwhile; then the pool is as it was.")
@click.option("--pin", is_flag=True, help="A CPU for each end, of product and floor alike.")
@click.option(
    "--markdown",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write there what has a target, as a table of Markdown.",
)
@json_option
def bench(scenarios: tuple[str, ...], quick: bool, list_only: bool, as_json: bool, **rest: Any) -> None:
    """Measure what a migration costs on this host.

    In turns with the floor: the barest loop in C that does the same work. Scenarios are named like demand, mixed/shmem
    or stream/*/auto; all of them run by default.
    """
    from agent.bench import compare, machine, pool, render, results, runner  # noqa: PLC0415 - not for --help
    from agent.bench.scenarios import HUGE_PAGES, Machine, catalogue, choose  # noqa: PLC0415
    from agent.output import print_json  # noqa: PLC0415

    earlier = compare.read_document(rest["earlier"]) if rest["earlier"] is not None else None
    scenarios = (*scenarios, "tls") if rest["tls"] else scenarios
    if list_only:
        for scenario in choose(catalogue(Machine.here(quick=quick)), scenarios, quick=quick):
            click.echo(scenario.name + (f"  (cannot run here: {scenario.lacking})" if scenario.lacking else ""))
        return
    pins = _pins() if rest["pin"] else (0, 0)
    pairs = rest["pairs"] or (QUICK_PAIRS if quick else PAIRS)
    plan = runner.Plan(pairs, QUICK_SECONDS if quick else None, *pins)
    reserving = pool.reserved(HUGE_PAGES) if rest["reserve_huge_pages"] else nullcontext()
    with _ending_on_sigterm(), reserving, progress() as tell:
        chosen = choose(catalogue(Machine.here(quick=quick)), scenarios, quick=quick)
        running = runner.Bench(plan, tell)
        measured = running.run([one for one in chosen if one.lacking is None])
    found = {result.name: result for result in results.results(measured)}
    ordered = [found.get(one.name) or results.left_out(one, one.lacking or "") for one in chosen]
    document = results.document(ordered, {**machine.environment(plan.placement.pinning), "quick": quick})
    changes = compare.compare(earlier, document) if earlier is not None else []
    if as_json:
        print_json(document | ({"changes": [one.as_map() for one in changes]} if earlier is not None else {}))
    else:
        _print(render.whole(ordered))
        if earlier is not None:
            _print(render.comparison(changes, compare.same_machine(earlier, document)))
    if rest["markdown"] is not None:
        _write(rest["markdown"], f"{render.markdown(ordered)}\n")
    if running.interrupted:
        raise SystemExit(130)
    if results.wrong(ordered):
        raise SystemExit(1)


def _pins() -> tuple[int, int]:
    """Return bit masks of two CPUs; UsageError where there is only one."""
    from postcopy.errors import UsageError  # noqa: PLC0415

    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2 or cpus[1] > 63:
        raise UsageError("--pin wants two CPUs below number 64")
    return 1 << cpus[0], 1 << cpus[1]


def _write(file: Path, text: str) -> None:
    from postcopy.errors import UsageError  # noqa: PLC0415

    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from error


def _print(renderable: Any) -> None:
    from rich.console import Console  # noqa: PLC0415

    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    Console(highlight=False, width=width, no_color="NO_COLOR" in os.environ or None).print(renderable)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that daemons and namespaces are taken away."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def progress() -> Iterator[Tell]:
    """Show on stderr what is run, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _what, _done, _total: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    console = Console(stderr=True, no_color="NO_COLOR" in os.environ or None)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
