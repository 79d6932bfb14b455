"""What the commands print: data on stdout, words on stderr, bars on a terminal only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from agent.admin import Tell


def print_json(data: dict[str, Any]) -> None:
    """Print one object on one line. ValueError for a number that JSON cannot say: better than what no parser reads."""
    with writing():
        sys.stdout.write(json.dumps(data, allow_nan=False) + "\n")


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Print pairs as an aligned list; in colour on a terminal that wants it."""
    pairs = list(rows)
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        from rich.console import Console  # noqa: PLC0415 - only where there is a terminal
        from rich.table import Table  # noqa: PLC0415

        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for pair in pairs:
            table.add_row(*pair)
        with writing():
            Console(highlight=False).print(table)
        return
    width = max(len(name) for name, _ in pairs)
    with writing():
        for name, value in pairs:
            sys.stdout.write(f"{name:<{width}}  {value}\n")


@contextmanager
def writing() -> Iterator[None]:
    """Have what the block prints written when it ends; an OSError says that it was the output."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"the output cannot be written: {error.strerror}") from error


def say(text: str) -> None:
    """Say something to the person at the terminal."""
    sys.stderr.write(f"postcopy: {text}\n")
    sys.stderr.flush()


@contextmanager
def progress(title: str) -> Iterator[Tell]:
    """Show a bar on stderr while the block runs, where stderr is a terminal; yield what moves it."""
    if not sys.stderr.isatty():
        yield lambda _progress: None
        return
    from rich.console import Console  # noqa: PLC0415 - only where there is a terminal
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    console = Console(stderr=True, no_color="NO_COLOR" in os.environ)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def tell(now: dict[str, Any]) -> None:
            bar.update(task, completed=now["placed"], total=now["total"], description=f"{title}: {now['state']}")

        yield tell
