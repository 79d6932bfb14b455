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
from matplotlib.ticker import FuncFormatter

from postcopy.errors import UsageError
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
    size: int
    lost: int


def read_trace(file: Path) -> Trace:
    """Read a trace; UsageError for what is none."""
    try:
        line, _, records = file.read_bytes().partition(b"\n")
        head = json.loads(line)
        faults = np.frombuffer(records, RECORD)
        whole = head["schema_version"] == SCHEMA_VERSION and len(faults) == head["faults"]
        sizes = [int(region["size_bytes"]) for region in head["regions"]]
        page_sizes = np.array([int(region["page_size"]) for region in head["regions"]], dtype=np.uint64)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no trace of faults: {error}") from error
    if not whole:
        raise UsageError(f"{file} is no trace of faults that this version reads, or a part of it is missing")
    region = field(faults["where"], PAGE_BITS, REGION_BITS).astype(np.intp)
    if len(region) and region.max() >= len(sizes):
        raise UsageError(f"{file} is no trace of faults: there is no region {region.max()}")
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.uint64)
    return Trace(
        seconds=faults["at_us"] / 1e6,
        latency=faults["latency_ns"] / 1e9,
        address=begins[region] + field(faults["where"], 0, PAGE_BITS) * page_sizes[region],
        found=field(faults["where"], PAGE_BITS + REGION_BITS, FOUND_BITS),
        thread=field(faults["where"], PAGE_BITS + REGION_BITS + FOUND_BITS, 22),
        size=sum(sizes),
        lost=int(head["lost"]),
    )


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
    figure.colorbar(image, ax=axes, label="faults in a cell")
    parts = [f"{int((trace.found == number).sum())} {words}" for number, words in enumerate(FOUND)]
    lost = f" The ring had no room for {trace.lost} earlier ones." if trace.lost else ""
    threads = len(np.unique(trace.thread))
    return f"{len(seconds)} faults of {threads} threads; their pages were: {', '.join(parts)}.{lost}", figure
