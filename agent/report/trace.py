"""Traces of faults as files hold them: bytes enter; columns and the map of time against address leave.

Numpy, which comes with matplotlib, does the counting; the format is told in postcopy/pump/trace.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter

from agent.report.fields import UnfitError, at, list_of, map_of, shown
from postcopy.errors import UsageError
from postcopy.limits import TRACE_NUMBER_MAX
from postcopy.pages.units import format_size

RECORD = np.dtype([("at_us", "<u4"), ("latency_ns", "<u4"), ("where", "<u8")])
PAGE_BITS, REGION_BITS, FOUND_BITS = 34, 6, 2
CELLS = (240, 120)
SCHEMA_VERSION = 1
FOUND = ("asked for", "on its way", "here already")


@dataclass(frozen=True, slots=True)
class Trace:
    """Columns, a row for each fault: seconds, latency in seconds, byte in all of memory, how it found its page."""

    seconds: Any
    latency: Any
    address: Any
    found: Any
    thread: Any
    sizes: list[int]
    lost: int

    @property
    def size(self) -> int:
        """Bytes of all memory."""
        return sum(self.sizes)


def read_trace(file: Path) -> Trace:
    """Read a trace; UsageError for what is none."""
    try:
        line, _, records = file.read_bytes().partition(b"\n")
        lost, sizes, page_sizes = read_head(line, len(records))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    except UnfitError as error:
        raise UsageError(f"{file} is no trace of faults: {error}") from error
    faults = np.frombuffer(records, RECORD)
    region = field(faults["where"], PAGE_BITS, REGION_BITS).astype(np.intp)
    if len(region) and region.max() >= len(sizes):
        raise UsageError(f"{file} is no trace of faults: there is no region {region.max()}")
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.uint64)
    return Trace(
        seconds=faults["at_us"] / 1e6,
        latency=faults["latency_ns"] / 1e9,
        address=begins[region] + field(faults["where"], 0, PAGE_BITS) * np.array(page_sizes, dtype=np.uint64)[region],
        found=field(faults["where"], PAGE_BITS + REGION_BITS, FOUND_BITS),
        thread=field(faults["where"], PAGE_BITS + REGION_BITS + FOUND_BITS, 22),
        sizes=sizes,
        lost=lost,
    )


def read_head(line: bytes, size: int) -> tuple[int, list[int], list[int]]:
    """Return, of a trace's first line and the size of the rest, the lost faults, each region's size and its pages'."""
    try:
        head = map_of("its first line", json.loads(line, parse_constant=str))
    except (ValueError, RecursionError) as error:
        raise UnfitError("its first line is no object of JSON") from error
    if at(head, "schema_version") != SCHEMA_VERSION:
        raise UnfitError(
            f"its schema_version is {shown(head['schema_version'])}, and this version reads {SCHEMA_VERSION}"
        )
    faults, lost = (whole_of(name, at(head, name), 0) for name in ("faults", "lost"))
    if size != faults * RECORD.itemsize:
        raise UnfitError(
            f"{faults} faults are {faults * RECORD.itemsize} bytes behind the first line, and it has {size}"
        )
    regions = list_of("regions", at(head, "regions"))
    if not regions:
        raise UnfitError("it has no regions")
    sizes, page_sizes = (
        [whole_of(f"regions[{index}].{name}", at(one, name, f"regions[{index}].")) for index, one in enumerate(regions)]
        for name in ("size_bytes", "page_size")
    )
    return lost, sizes, page_sizes


def whole_of(path: str, value: Any, least: int = 1) -> int:
    """Return a whole number that fits where sizes do."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= TRACE_NUMBER_MAX:
        raise UnfitError(f"{path} is {shown(value)}, not a whole number from {least} on")
    return value


def field(words: Any, shift: int, bits: int) -> Any:
    """Return the bits of each word from `shift` on."""
    return (words >> np.uint64(shift)) & np.uint64((1 << bits) - 1)


def heat_map(trace: Trace) -> tuple[str, Figure]:
    """Draw how many faults came when and where."""
    figure = Figure(figsize=(9.0, 5.0))
    axes = figure.add_subplot()
    axes.set_title("Faults by time and address")
    begin = float(trace.seconds.min()) if len(trace.seconds) else 0.0
    seconds = trace.seconds - begin
    end = max(float(seconds.max()) if len(seconds) else 0.0, 1e-3)
    counts, _, _ = np.histogram2d(seconds, trace.address.astype(float), bins=CELLS, range=((0, end), (0, trace.size)))
    shown = np.ma.masked_equal(counts.T, 0)
    image = axes.imshow(
        shown, origin="lower", aspect="auto", extent=(0, end, 0, trace.size), cmap="inferno_r", interpolation="nearest",
        norm=LogNorm(vmin=1, vmax=max(2.0, float(counts.max()))),
    )  # fmt: skip
    axes.grid(visible=False)
    axes.set_yticks(np.linspace(0, trace.size, 5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_size(value)))
    axes.set_xlabel("seconds since the first fault")
    scale = figure.colorbar(image, ax=axes, label="faults in a cell").ax.yaxis
    scale.set_major_formatter(LogFormatter())
    scale.set_minor_formatter(LogFormatter())
    parts = [f"{int((trace.found == number).sum())} {words}" for number, words in enumerate(FOUND)]
    lost = f" The ring had no room for {trace.lost} earlier ones." if trace.lost else ""
    threads = len(np.unique(trace.thread))
    return f"{len(seconds)} faults of {threads} threads; their pages were: {', '.join(parts)}.{lost}", figure
