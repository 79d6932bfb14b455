"""The plots of a report: runs enter, SVG leaves. Matplotlib draws them, which is an extra of its own: postcopy[report].

A colour is a run's throughout. Text stays text, so that it can be searched and its size is the page's.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from agent.report.runs import PATHS, Run
from agent.report.trace import heat_map, read_trace
from postcopy.errors import UsageError
from postcopy.pages.units import format_seconds, format_size

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "postcopy",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4ea",
    "axes.edgecolor": "#8a8a96",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
}
COLOURS = ("#1f6fb4", "#d1603d", "#3b8f5a", "#8455a3", "#8a7a2f", "#4a4a55")
PATH_COLOURS = {"demand": "#d1603d", "push": "#1f6fb4", "zero": "#b9bcc8", "handed_over": "#3b8f5a"}
SIZE = (9.0, 4.2)
# From here on a percentile plot of few values shows single ones.
PARTS = (1.0, 0.1, 0.01, 0.001, 1e-4, 1e-5, 1e-6, 1e-7)


def colour(index: int) -> str:
    """Return the colour of a run."""
    return COLOURS[index % len(COLOURS)]


def plots(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return each plot that the runs have data for: what it shows, in words, and its SVG."""
    with mpl.rc_context({**STYLE, "text.parse_math": False}):  # a run's name is a file's
        drawn = [
            percentiles(runs),
            latency_over_time(runs),
            residency(runs),
            throughput(runs),
            pages(runs),
            downtime(runs),
            fault_parts(runs),
        ]
        return [(text, svg(figure)) for text, figure in filter(None, drawn)]


def traced(file: Path, run: Run) -> tuple[str, str]:
    """Return the map of a trace of a run's faults, as plots() returns its own; UsageError for one of another run."""
    with mpl.rc_context(STYLE):
        trace = read_trace(file)
        of_memory = [one["size_bytes"] for one in run.report["memory"]]
        if of_memory != trace.sizes:
            told, there = (", ".join(map(format_size, sizes)) or "none" for sizes in (of_memory, trace.sizes))
            raise UsageError(f"{file} is of another run than {run.name}: of memory of {there}, and not of {told}")
        text, figure = heat_map(trace)
        counted, recorded = run.report["fault_latency_seconds"]["count"], len(trace.seconds) + trace.lost
        if counted != recorded:
            text += f" {run.name} counts {counted} faults and the trace {recorded}: it may be of another run."
        return text, svg(figure)


def svg(figure: Figure) -> str:
    """Return a figure as an element for a page: no header, nothing that changes from one drawing to the next."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)


def blank(title: str, height: float = SIZE[1]) -> tuple[Figure, Axes]:
    """Begin a plot."""
    figure = Figure(figsize=(SIZE[0], height))
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def in_seconds(axis: Any) -> None:
    """Label an axis of times."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value)))
    axis.set_minor_formatter(NullFormatter())


def percentiles(runs: Sequence[Run]) -> tuple[str, Figure] | None:
    """Draw how long the slowest part of faults took: the further to the right, the rarer."""
    if not any(run.tail("fault_latency") for run in runs):
        return None
    figure, axes = blank("Fault latency by percentile")
    least = 1.0
    for index, run in enumerate(runs):
        for what, style, label in (("fault_latency", "-", "fault"), ("stall", ":", "stall, the guest's own clock")):
            tail = [(seconds, longer) for seconds, longer in run.tail(what) if longer > 1e-9]
            if tail:
                axes.plot(
                    [one[1] for one in tail],
                    [one[0] for one in tail],
                    style,
                    color=colour(index),
                    label=f"{run.name}: {label}",
                )
                least = min(least, tail[-1][1])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1.0, least / 1.5)
    shown = [part for part in PARTS if part >= least / 1.5]
    axes.set_xticks(shown, [f"{100 * (1 - part):.10g} %" for part in shown])
    axes.xaxis.set_minor_formatter(NullFormatter())
    in_seconds(axes.yaxis)
    axes.set_xlabel("of all faults took at most")
    axes.legend()
    return "How long faults took, rarer ones to the right. Dotted: the same as the guest's own clock felt it.", figure


def mark_switchover(axes: Axes, runs: Sequence[Run]) -> None:
    """Mark when the guest stopped and when it ran again: time begins with its run at the destination."""
    for index, run in enumerate(runs):
        down = run.report["downtime_seconds"]
        axes.axvspan(-down, 0, color=colour(index), alpha=0.25, lw=0)
    axes.axvline(0, color="#4a4a55", lw=1)
    axes.annotate(
        "switchover", (0, 1), (4, -12), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=9
    )
    axes.set_xlabel("seconds since the guest ran at the destination")


def latency_over_time(runs: Sequence[Run]) -> tuple[str, Figure] | None:
    """Draw p50 and p99 of the faults between two looks."""
    if not any(run.course for run in runs):
        return None
    figure, axes = blank("Fault latency over time")
    for index, run in enumerate(runs):
        course = run.course
        looks = [0.0, *course.get("seconds", [])]
        for key, style in (("p50", "-"), ("p99", "--")):
            # A percentile is of the time since the look before. Where no fault was served there is none, and no line.
            values = [nan, *(value or nan for value in course.get(key, []))]
            axes.step(looks, values, style, color=colour(index), label=f"{run.name}: {key}")
    axes.set_yscale("log")
    in_seconds(axes.yaxis)
    mark_switchover(axes, runs)
    axes.legend()
    text = (
        "Percentiles of the faults between two looks at the destination's counters; no line where none was served. "
        "Shaded: the downtime."
    )
    return text, figure


def residency(runs: Sequence[Run]) -> tuple[str, Figure] | None:
    """Draw which part of memory was at the destination."""
    if not any(run.course for run in runs):
        return None
    figure, axes = blank("Memory at the destination", 3.2)
    for index, run in enumerate(runs):
        if run.course:
            parts = [100 * part for part in run.course["resident"]]
            axes.plot([0.0, *run.course["seconds"]], [0.0, *parts], color=colour(index), label=run.name)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_ylim(0, 105)
    mark_switchover(axes, runs)
    axes.legend()
    return "Which part of the guest's pages was resident.", figure


def throughput(runs: Sequence[Run]) -> tuple[str, Figure] | None:
    """Draw what came over the wire."""
    if not any(run.throughput() for run in runs):
        return None
    figure, axes = blank("Throughput", 3.2)
    for index, run in enumerate(runs):
        rates = run.throughput()
        mebibytes = [one[1] / (1 << 20) for one in rates]
        axes.step([one[0] for one in rates], mebibytes, color=colour(index), label=run.name)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} MiB/s"))
    axes.set_ylim(bottom=0)
    mark_switchover(axes, runs)
    axes.legend()
    return "Bytes received over both connections, between two looks.", figure


def bars(
    title: str, parts: Sequence[dict[str, float]], runs: Sequence[Run], colours: dict[str, str]
) -> tuple[Figure, Axes]:
    """Draw a stacked bar for each run."""
    figure, axes = blank(title, 0.8 + 0.45 * len(runs))
    names = list(dict.fromkeys(name for one in parts for name in one))
    left = [0.0] * len(runs)
    for number, name in enumerate(names):
        values = [one.get(name, 0.0) for one in parts]
        axes.barh(range(len(runs)), values, 0.6, left, color=colours.get(name, colour(number)), label=name)
        left = [begin + value for begin, value in zip(left, values, strict=True)]
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.15 - 0.45 / len(runs)), ncols=max(1, len(names)))
    return figure, axes


def pages(runs: Sequence[Run]) -> tuple[str, Figure] | None:
    """Draw by which way pages came."""
    parts = [
        {path: run.report["pages"].get(path, 0) for path in PATHS if run.report["pages"].get(path)} for run in runs
    ]
    if not any(parts):
        return None
    figure, axes = bars("Pages by path", parts, runs, PATH_COLOURS)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return "demand: a fault asked for it. push: it was sent unasked. zero: nothing travelled but its place.", figure


def downtime(runs: Sequence[Run]) -> tuple[str, Figure] | None:
    """Draw of what the downtime is made."""
    parts = [run.report.get("details", {}).get("downtime_parts_seconds") or {} for run in runs]
    if not any(parts):
        return None
    figure, axes = bars("Downtime", parts, runs, {})
    in_seconds(axes.xaxis)
    return (
        "stop: the guest's last step to its state sent. load: to the word to run. run: to its first step there.",
        figure,
    )


def fault_parts(runs: Sequence[Run]) -> tuple[str, Figure] | None:
    """Draw of what the mean time of a fault is made."""
    parts = [run.fault_parts() for run in runs]
    if not any(parts):
        return None
    figure, axes = bars("A fault's mean time", parts, runs, {})
    in_seconds(axes.xaxis)
    text = (
        "Of faults whose page came as the answer to their own request. request: from the fault read to its request "
        "sent. source: from the request read there to the answer sent. wire: all else until the answer is here, "
        "sockets and scheduling at both ends as well. place: until the page is placed. wake: what the guest's own "
        "clock felt beyond that, raising the fault and getting back from it, on average over all of them."
    )
    return text, figure
