"""What `postcopy top` shows: a screen for a terminal, a line for everything else. Maps of rates enter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from postcopy.pages.units import format_rate, format_seconds, format_size
from postcopy.session.states import ENDED

SHADES = " ░▒▓█"
PROGRESS_COLUMNS = 40
PERCENTILES = (("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("p999", "p99.9"), ("max", "max"))

NO_GUEST = "no guest has come"
FIXED_ROWS = 4
"""Of who this is, how far it is, and the pace."""
FRAME_ROWS = 2
TITLE_ROWS = 1
"""Of the histogram."""

MAPS = {"destination": "memory that is here", "source": "memory that has left"}


@dataclass(frozen=True, slots=True)
class Room:
    """What each part has of a terminal: on a low one the histogram stands beside the map, and both are smaller."""

    map_columns: int
    bar_columns: int
    bars: int
    vcpus: int
    beside: bool


ROOMY = Room(map_columns=64, bar_columns=40, bars=16, vcpus=16, beside=False)
LOW = Room(map_columns=32, bar_columns=18, bars=9, vcpus=16, beside=True)


def room(now: dict[str, Any], height: int) -> Room:
    """Share out a terminal of so many rows, so that every part has its place."""
    faults, vcpus = knows_faults(now), len(now["stall_seconds_per_vcpu"])
    least = FIXED_ROWS + 1 + 2 * faults
    wanted = 2 * min(vcpus, ROOMY.vcpus) + (vcpus > ROOMY.vcpus)
    if least + map_rows(now, ROOMY) + wanted + histogram_rows(ROOMY) * faults <= height:
        return ROOMY
    left = height - least - (max(map_rows(now, LOW), histogram_rows(LOW)) if faults else map_rows(now, LOW))
    return LOW if wanted <= left else replace(LOW, vcpus=max(1, (left - 1) // 2))


def map_rows(now: dict[str, Any], shares: Room) -> int:
    """Return how many rows the map takes."""
    return FRAME_ROWS + -(-len(now["residency"]) // shares.map_columns) if now["residency"] else 0


def histogram_rows(shares: Room) -> int:
    """Return how many rows the histogram takes at most."""
    return TITLE_ROWS + shares.bars


def line(now: dict[str, Any]) -> str:
    """Return one line for a pipe."""
    if not now["memory_bytes"]:
        return f"{now['role']} {now['state']}, {NO_GUEST}"
    latest = now["fault_latency_seconds"]["latest"]
    words = [
        f"{now['role']} {now['state']}",
        f"{100 * now['resident']:.1f} % resident",
        f"{format_size(now['remaining_bytes'])} to come",
    ]
    if now["role"] == "destination" or knows_faults(now):
        words.append(f"{now['faults_per_second']:.0f} faults/s")
    if latest["count"]:
        words.append(f"p50 {format_seconds(latest['p50'])}, p99 {format_seconds(latest['p99'])}")
    words.append(f"{format_rate(sum(now['bytes_per_second'].values()))}")
    if now["to_go_seconds"] is not None:
        words.append(f"{format_seconds(now['to_go_seconds'])} to go")
    return ", ".join(words)


def knows_faults(now: dict[str, Any]) -> bool:
    """Whether any fault is known of: a source is told of them by its destination."""
    return bool(now["fault_latency_seconds"]["overall"]["count"])


def screen(now: dict[str, Any], height: int) -> RenderableType:
    """Return the whole screen, for a terminal of so many rows."""
    if not now["memory_bytes"]:
        return Group(heading(now), Text(NO_GUEST))
    shares = room(now, height)
    drawn: list[RenderableType] = []
    if now["residency"]:
        cells = residency(now["residency"], shares.map_columns)
        drawn.append(Panel(cells, title=MAPS[now["role"]], title_align="left", expand=False))
    table: list[RenderableType] = []
    faults = knows_faults(now)
    if faults or any(vcpu["overall"]["count"] for vcpu in now["stall_seconds_per_vcpu"]):
        table.append(latencies(now, shares.vcpus))
    title, when = ("faults, all", "overall") if now["state"] in ENDED else ("faults, now", "latest")
    bars = [histogram(title, now["fault_latency_octaves"][when], shares)] if faults else []
    if shares.beside and (drawn or bars):
        upper = Table.grid(padding=(0, 1))
        upper.add_row(*drawn, *bars)
        drawn, bars = [upper], []
    return Group(heading(now), progress(now), pace(now), *drawn, *table, *bars)


def heading(now: dict[str, Any]) -> Text:
    """Say who this is and who owns the guest."""
    owner = "owns the guest" if now["owns_guest"] else "owns no guest"
    return Text.assemble((now["role"], "bold cyan"), "  ", (now["state"], "bold"), f"  {owner}")


def progress(now: dict[str, Any]) -> RenderableType:
    """Show how much is at the destination, and when all of it will be."""
    table = Table.grid(padding=(0, 1))
    there = now["memory_bytes"] - now["remaining_bytes"]
    to_go = "" if now["to_go_seconds"] is None else f"{format_seconds(now['to_go_seconds'])} to go"
    table.add_row(
        ProgressBar(total=1.0, completed=now["resident"], width=PROGRESS_COLUMNS),
        f"{100 * now['resident']:.1f} %",
        f"{format_size(there)} of {format_size(now['memory_bytes'])}",
        to_go,
    )
    return table


def pace(now: dict[str, Any]) -> RenderableType:
    """Show how fast pages move, by the way they take."""
    pages = now["pages_per_second"]
    words = [f"{path} {pages[path]:.0f}/s" for path in ("demand", "push", "zero", "duplicate") if path in pages]
    moved = [f"{way} {format_rate(rate)}" for way, rate in now["bytes_per_second"].items() if rate]
    if now["role"] == "destination":
        moved.insert(0, f"{now['faults_per_second']:.0f} faults/s, {now['waiting_faults']} waiting")
    elif knows_faults(now):
        moved.insert(0, f"{now['faults_per_second']:.0f} faults/s")
    lines = (f"pages: {', '.join(words)}" if words else "", "; ".join(moved))
    return Text("\n".join(filter(None, lines)))


def residency(parts: list[float], columns: int) -> Text:
    """Draw a map of memory: each character is a piece of it, the fuller the more of it is there."""
    cells = "".join(shade(part) for part in parts)
    return Text("\n".join(cells[start : start + columns] for start in range(0, len(cells), columns)))


def shade(part: float) -> str:
    """Return the character of a part: none and all have one of their own."""
    if part in {0.0, 1.0}:
        return SHADES[-1] if part else SHADES[0]
    return SHADES[1 + int(part * (len(SHADES) - 2))]


def latencies(now: dict[str, Any], vcpus: int) -> RenderableType:
    """Show the percentiles of faults and of each vCPU's stalls, of the latest moment and overall."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("", "count", *(label for _, label in PERCENTILES)):
        table.add_column(name, justify="left" if not name else "right")
    for name, times in rows(now, vcpus):
        figures = [format_seconds(times[key]) for key, _ in PERCENTILES] if times["count"] else ["-"] * len(PERCENTILES)
        table.add_row(name, f"{times['count']:.0f}", *figures)
    more = len(now["stall_seconds_per_vcpu"]) - vcpus
    if more > 0:
        table.add_row(f"and {more} more")
    return table


def rows(now: dict[str, Any], vcpus: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield names and figures of the lines of the table: of the vCPUs, those that have waited longest."""
    if knows_faults(now):
        yield "faults, now", now["fault_latency_seconds"]["latest"]
        yield "faults, all", now["fault_latency_seconds"]["overall"]
    stalls = list(enumerate(now["stall_seconds_per_vcpu"]))
    slowest = sorted(stalls, key=lambda one: -one[1]["overall"]["max"])[:vcpus]
    for number, vcpu in sorted(slowest, key=lambda one: one[0]):
        yield f"vCPU {number} stalls, now", vcpu["latest"]
        yield f"vCPU {number} stalls, all", vcpu["overall"]


def histogram(title: str, octaves: list[tuple[float | None, int]], shares: Room) -> RenderableType:
    """Draw faults, a bar for each power of two of a microsecond between the least and the most.

    Where those are more than there are rows, a bar is of several, and its bound is that of the longest.
    """
    table = Table.grid(padding=(0, 1))
    some = [index for index, (_, count) in enumerate(octaves) if count]
    if not some:
        return table
    table.add_row("", title)
    shown = octaves[some[0] : some[-1] + 1]
    each = -(-len(shown) // shares.bars)
    shown += octaves[some[-1] + 1 :][: -len(shown) % each]
    bars = [shown[start : start + each] for start in range(0, len(shown), each)]
    counts = [sum(count for _, count in bar) for bar in bars]
    for bar, count in zip(bars, counts, strict=True):
        bound = bar[-1][0]
        label = "more" if bound is None else f"< {format_seconds(bound)}"
        table.add_row(Text(label, justify="right"), "█" * -(-shares.bar_columns * count // max(counts)), str(count))
    return table
