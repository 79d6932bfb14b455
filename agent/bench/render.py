"""The table of a bench, for people. Results enter, rich tables and lines of text leave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from agent.bench.compare import Change
from agent.bench.figures import FIGURES
from agent.bench.results import Result
from agent.bench.targets import Verdict, format_figure

# heading, figure, name of its ratio to the floor
COLUMNS = (
    ("fault p50", "fault_p50", "fault_p50"),
    ("fault p99", "fault_p99", "fault_p99"),
    ("stall p50", "stall_p50", None),
    ("stall p99", "stall_p99", None),
    ("throughput", "throughput", "throughput"),
    ("CPU/GiB", "cpu", "cpu"),
    ("downtime", "downtime", None),
)
TIMES = "\N{MULTIPLICATION SIGN}"
_STYLES = {True: "green", False: "bold red", None: "yellow"}
_MARKS = {True: "reached", False: "MISSED", None: "not judged"}


def table(results: Sequence[Result]) -> Table:
    """Return one row a scenario: the product's medians, and in brackets how many times the floor's they are."""
    found = Table(title="postcopy bench: medians (times the floor)", title_justify="left")
    found.add_column("scenario", no_wrap=True)
    for heading, _, _ in COLUMNS:
        found.add_column(heading, justify="right", no_wrap=True)
    found.add_column("runs", justify="right", no_wrap=True)
    found.add_column("targets", no_wrap=True)
    for result in results:
        if result.skipped is not None:
            found.add_row(result.name, *[""] * (len(COLUMNS) + 1), Text("not run", "yellow"))
            continue
        cells = [_cell(result, figure, ratio) for _, figure, ratio in COLUMNS]
        found.add_row(result.name, *cells, _runs(result), _targets(result.verdicts))
    return found


def _cell(result: Result, figure: str, ratio: str | None) -> str:
    value = result.product_medians.get(figure)
    if value is None:
        return ""
    text = format_figure(figure, value)
    times = result.ratio.get(ratio) if ratio is not None else None
    return text if times is None else f"{text} ({times:.2f}x)"


def _runs(result: Result) -> str:
    return f"{result.pairs}{f', {result.disturbed} disturbed' if result.disturbed else ''}"


def _targets(verdicts: Iterable[Verdict]) -> Text:
    text = Text()
    for verdict in verdicts:
        text.append(f"{_MARKS[verdict.reached]} ", _STYLES[verdict.reached])
    return text


def notes(results: Sequence[Result]) -> list[Text]:
    """Return a line for each target, for each problem, and for what was not run."""
    lines = []
    for result in results:
        lines += [Text(f"{result.name}: {verdict}", _STYLES[verdict.reached]) for verdict in result.verdicts]
        if result.floor is not None:
            lines.append(Text(f"{result.name}: the floor is: {result.floor['way']}", "dim"))
        if result.skipped is not None:
            lines.append(Text(f"{result.name}: not run: {result.skipped}", "yellow"))
        lines += [Text(f"{result.name}: WRONG: {problem}", "bold red") for problem in result.problems]
        own = result.product_medians.get("own_bytes")
        if own is not None:
            lines.append(Text(f"{result.name}: an agent's own memory is {format_figure('own_bytes', own)}", "dim"))
    disturbed = [result.name for result in results if result.disturbed]
    if disturbed:
        lines.append(Text(f"others used this machine meanwhile, do not trust: {', '.join(disturbed)}", "yellow"))
    judged = [verdict.reached for result in results for verdict in result.verdicts]
    counts = ", ".join(f"{judged.count(reached)} {mark}" for reached, mark in _MARKS.items())
    return [*lines, Text(f"targets: {counts}", "bold")]


def whole(results: Sequence[Result]) -> RenderableType:
    """Return the table and its notes."""
    return Group(table(results), *notes(results))


def markdown(results: Sequence[Result]) -> str:
    """Return a table of Markdown: what has a target, one row a scenario, what was reached and what was missed."""
    rows: list[tuple[str, ...]] = [("scenario", "product", "of what it is held against", "target", ""), ("---",) * 5]
    for result in results:
        if result.verdicts:
            name = f"`{result.name}`{' (disturbed)' if result.disturbed else ''}"
            columns = zip(*(_columns(verdict) for verdict in result.verdicts), strict=True)
            rows.append((name, *(", ".join(dict.fromkeys(filter(None, column))) for column in columns)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _columns(verdict: Verdict) -> tuple[str, str, str, str]:
    """Return what was measured, how many times the other that is, what it should be, and what came of it."""
    target, mark = verdict.target, _MARKS[verdict.reached]
    value = "" if verdict.value is None else format_figure(target.figure, verdict.value)
    times = "" if verdict.ratio is None else f"{FIGURES[target.figure][0]} {verdict.ratio:.2f} {TIMES}"
    bound = f"{FIGURES[target.figure][0]} {value}", times, str(target).replace(" x ", f" {TIMES} ")
    return *bound, mark if verdict.reached else f"**{mark.lower()}**"


def comparison(changes: Sequence[Change], differences: Sequence[str]) -> RenderableType:
    """Return the table of a comparison; `differences` of the environments are said first."""
    found = Table(title="compared with the earlier bench", title_justify="left")
    for heading in ("scenario", "figure", "before", "after", "change", "times the floor", "verdict"):
        found.add_column(heading, no_wrap=True)
    styles = {"better": "green", "worse": "bold red", "same": ""}
    for one in changes:
        ratio = f"{one.ratio_before:.2f} → {one.ratio_after:.2f}" if one.ratio_before and one.ratio_after else ""
        values = [format_figure(one.figure, value) for value in (one.before, one.after)]
        verdict = Text(one.verdict, styles[one.verdict])
        found.add_row(one.scenario, FIGURES[one.figure][0], *values, f"{one.change:+.0%}", ratio, verdict)
    return Group(*(Text(f"not the same machine: {one}", "yellow") for one in differences), found)
