"""What `postcopy top` shows: a screen for a terminal, a line for everything else. Maps of rates enter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from postcopy.pages.units import format_rate, format_seconds, format_size

SHADES = " ░▒▓█"
MAP_COLUMNS = 64
BAR_COLUMNS = 40
PERCENTILES = (("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("p999", "p99.9"), ("max", "max"))
VCPUS_SHOWN = 16


def line(now: dict[str, Any]) -> str:
    """Return one line for a pipe."""
    latest = now["fault_latency_seconds"]["latest"]
    words = [
        f"{now['role']} {now['state']}",
        f"{100 * now['resident']:.1f} % resident",
        f"{format_size(now['remaining_bytes'])} to come",
    ]
    if now["role"] == "destination":
        words.append(f"{now['faults_per_second']:.0f} faults/s")
    if latest["count"]:
        words.append(f"p50 {format_seconds(latest['p50'])}, p99 {format_seconds(latest['p99'])}")
    words.append(f"{format_rate(sum(now['bytes_per_second'].values()))}")
    if now["to_go_seconds"] is not None:
        words.append(f"{format_seconds(now['to_go_seconds'])} to go")
    return ", ".join(words)


def screen(now: dict[str, Any]) -> RenderableType:
    """Return the whole screen."""
    parts: list[RenderableType] = [heading(now), progress(now), pace(now)]
    if now["residency"]:
        parts.append(Panel(residency(now["residency"]), title="memory", title_align="left", expand=False))
    if now["fault_latency_seconds"]["overall"]["count"]:
        parts += [latencies(now), histogram(now["fault_latency_octaves"])]
    elif any(vcpu["overall"]["count"] for vcpu in now["stall_seconds_per_vcpu"]):
        parts.append(latencies(now))
    return Group(*parts)


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
        ProgressBar(total=1.0, completed=now["resident"] if now["memory_bytes"] else 0.0, width=BAR_COLUMNS),
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
    return Text("pages: " + ", ".join(words) + "\n" + "; ".join(moved))


def residency(parts: list[float]) -> Text:
    """Draw a map of memory: each character is a piece of it, the fuller the more of it is there."""
    cells = "".join(shade(part) for part in parts)
    return Text("\n".join(cells[start : start + MAP_COLUMNS] for start in range(0, len(cells), MAP_COLUMNS)))


def shade(part: float) -> str:
    """Return the character of a part: none and all have one of their own."""
    if part in {0.0, 1.0}:
        return SHADES[-1] if part else SHADES[0]
    return SHADES[1 + int(part * (len(SHADES) - 2))]


def latencies(now: dict[str, Any]) -> RenderableType:
    """Show the percentiles of faults and of each vCPU's stalls, of the latest moment and overall."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("", "count", *(label for _, label in PERCENTILES)):
        table.add_column(name, justify="left" if not name else "right")
    for name, times in rows(now):
        figures = [format_seconds(times[key]) for key, _ in PERCENTILES] if times["count"] else ["-"] * len(PERCENTILES)
        table.add_row(name, f"{times['count']:.0f}", *figures)
    return table


def rows(now: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield names and figures of the lines of the table."""
    if now["fault_latency_seconds"]["overall"]["count"]:
        yield "faults, now", now["fault_latency_seconds"]["latest"]
        yield "faults, all", now["fault_latency_seconds"]["overall"]
    for number, vcpu in enumerate(now["stall_seconds_per_vcpu"][:VCPUS_SHOWN]):
        yield f"vCPU {number} stalls, now", vcpu["latest"]
        yield f"vCPU {number} stalls, all", vcpu["overall"]


def histogram(octaves: list[tuple[float | None, int]]) -> RenderableType:
    """Draw the latest moment's faults, a bar for each power of two of a microsecond in which there are any."""
    counts = [count for _, count in octaves]
    table = Table.grid(padding=(0, 1))
    if not any(counts):
        return table
    first = next(index for index, count in enumerate(counts) if count)
    last = max(index for index, count in enumerate(counts) if count)
    for bound, count in octaves[first : last + 1]:
        label = "more" if bound is None else f"< {format_seconds(bound)}"
        table.add_row(Text(label, justify="right"), "█" * -(-BAR_COLUMNS * count // max(counts)), str(count))
    return table
