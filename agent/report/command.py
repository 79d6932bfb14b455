"""`postcopy report`, as click sees it: reports of migrations enter; one page of HTML leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import click

OUTPUT = "report.html"
FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN.json [OTHER.json]...")
@click.option(
    "--output", "-o", type=FILE, default=OUTPUT, show_default=True, metavar="FILE", help="Where the page goes."
)
@click.option(
    "--trace",
    type=FILE,
    metavar="FILE",
    help="The first run's faults, as --trace of `destination` or `demo` recorded them.",
)
@click.option(
    "--check",
    "checks",
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="What `check --json` said after the first run; said again, after the next one.",
)
def report(files: tuple[Path, ...], output: Path, trace: Path | None, checks: tuple[Path, ...]) -> None:
    """Draw reports as one page of HTML, several side by side.

    A report is what `demo --json` and `migrate --json` print; of the two only the demo checks its guest by itself.
    Needs matplotlib: `pip install matplotlib`, with the pip of the Python that runs this.
    """
    from agent.report.runs import read_checks, read_runs  # noqa: PLC0415 - not for --help, here and below
    from postcopy.errors import HostError, UsageError  # noqa: PLC0415

    runs = read_checks(read_runs(files), checks)
    try:
        from agent.report.plots import plots, traced  # noqa: PLC0415
    except ImportError as error:
        raise HostError(f"plots need matplotlib ({error}): {sys.executable} -m pip install matplotlib") from error
    from agent.report.page import page  # noqa: PLC0415

    try:
        drawn = plots(runs) + ([traced(trace, runs[0])] if trace is not None else [])
        output.write_text(page(runs, drawn), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from error
    click.echo(output)
