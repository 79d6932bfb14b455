"""One row for each memory type that other scenarios leave out: what is migrated, and what this machine lacks for it.

The machine's mounts, settings and pools enter; rows of plain data leave. Each is a migration with its push and one vCPU
that touches every page meanwhile. The floor places by COPY (huge pages: by CONTINUE) into memory of the same pages; for
pages of 1 GiB there is none: what a fault costs there is the whole page's way, and is shown as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.bench.floor import FloorSetup, Way
from agent.bench.machine import THP, chosen
from agent.bench.pool import HUGE_POOL, free_pages
from agent.bench.product import ProductSetup
from postcopy.kernel.hugetlb import Hugetlb

MIB = 1 << 20
GIB = 1 << 30
HUGE = 2 * MIB
SMALL_BYTES = 128 * MIB
# Of huge pages, as `mixed` has it: a floor of 64 such pages is over in 15 ms, and what begins and ends takes longer.
HUGE_BYTES = 512 * MIB
MOUNTS = Path("/proc/self/mounts")
POLL_NS = 200_000  # the product's default
GIGANTIC_POOL = Hugetlb("hugetlb-1G", GIB)
# Both ends have their page, and by COPY each connection a buffer of one besides.
GIGANTIC_BYTES = {"minor": 0, "missing": 3 * GIB}


@dataclass(frozen=True, slots=True)
class Row:
    """One memory type in one mode; `lacking` says why it cannot be measured here."""

    name: str
    product: ProductSetup
    floors: dict[str, FloorSetup]
    lacking: str | None = None


def rows(available: int) -> Iterator[Row]:
    """Return the rows; `available` are the bytes of memory to be had."""
    yield from _small("anonymous", ("auto", "move"), FloorSetup(SMALL_BYTES, anonymous=True))
    for name, setting in (("anonymous", "enabled"), ("shmem", "shmem_enabled")):
        lacking = _thp(setting, "madvise" if setting == "enabled" else "advise", "always", "within_size")
        modes = ("auto",) if name == "anonymous" else ("auto", "minor", "missing")
        floor = FloorSetup(SMALL_BYTES, anonymous=name == "anonymous")
        yield from _small(name, modes, floor, thp=True, lacking=lacking)
    # Of itself huge, without being asked for.
    lacking = _thp("shmem_enabled", "always")
    yield from _small("shmem", ("auto",), FloorSetup(SMALL_BYTES), name="shmem-always", lacking=lacking)
    folder = _mount("tmpfs", "/dev/shm")  # noqa: S108 - a mount to look for
    lacking = None if folder else "no tmpfs is mounted at /dev/shm"
    yield from _small("tmpfs", ("auto", "minor", "missing"), FloorSetup(SMALL_BYTES), folder=folder, lacking=lacking)
    yield from _hugetlbfs()
    yield from _gigantic(available)


def _floors(base: FloorSetup, way: Way) -> dict[str, FloorSetup]:
    """Return both ways of waiting of a floor that places by `way`."""
    setup = FloorSetup(base.size, base.page_size, anonymous=base.anonymous, demand=way, push=way)
    polls = FloorSetup(base.size, base.page_size, anonymous=base.anonymous, demand=way, push=way, poll_ns=POLL_NS)
    return {f"{way}, polls": polls, f"{way}, blocks": setup}


def _small(
    memory: str,
    modes: tuple[str, ...],
    floor: FloorSetup,
    *,
    thp: bool = False,
    name: str | None = None,
    folder: str | None = None,
    lacking: str | None = None,
) -> Iterator[Row]:
    name = name or (f"{memory}-thp" if thp else memory)
    for mode in modes:
        product = ProductSetup(memory=memory, size=floor.size, mode=mode, thp=thp, folder=folder)
        yield Row(f"{name}/{mode}", product, _floors(floor, "continue" if mode == "minor" else "copy"), lacking)


def _hugetlbfs() -> Iterator[Row]:
    folder = _mount("hugetlbfs", pagesize="2M")
    size = max(8, min(HUGE_BYTES // HUGE, free_pages(HUGE_POOL) // 3)) * HUGE
    lacking = None if folder else "no hugetlbfs of 2 MiB pages is mounted: mount -t hugetlbfs -o pagesize=2M none DIR"
    lacking = lacking or _short(HUGE_POOL, 2 * size // HUGE + 4)
    for mode in ("auto", "minor", "missing"):
        product = ProductSetup(memory="hugetlbfs-2M", size=size, mode=mode, folder=folder)
        way: Way = "copy" if mode == "missing" else "continue"
        yield Row(f"hugetlbfs-2M/{mode}", product, _floors(FloorSetup(size, HUGE), way), lacking)


def _gigantic(available: int) -> Iterator[Row]:
    for mode, buffers in GIGANTIC_BYTES.items():
        lacking = _short(GIGANTIC_POOL, 2)
        if lacking is None and available < buffers:
            lacking = f"{available // MIB} MiB of memory are available, {buffers // MIB} are needed for the buffers"
        yield Row(f"hugetlb-1G/{mode}", ProductSetup(memory="hugetlb-1G", size=GIB, mode=mode), {}, lacking)


# --- what this machine has --------------------------------------------------------------------------------------------


def _short(pool: Hugetlb, needed: int) -> str | None:
    free = free_pages(pool)
    if free >= needed:
        return None
    command = f"echo {needed} > {pool.pool_folder / 'nr_hugepages'}"
    return f"{free} pages of {pool.name} are free, {needed} are needed: {command}"


def _mount(kind: str, folder: str | None = None, pagesize: str | None = None) -> str | None:
    """Return a folder where a filesystem of that kind is mounted."""
    for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
        _, place, found, options, *_ = line.split()
        sized = pagesize is None or f"pagesize={pagesize}" in options.split(",")
        if found == kind and sized and folder in {None, place}:
            return place
    return None


def _thp(setting: str, *good: str) -> str | None:
    """Say how to have transparent huge pages used so, the first way named, None where they are."""
    file = THP / setting
    found = chosen(file)
    if not found:
        return "this kernel has no transparent huge pages of this memory"
    return None if found in good else f"{file} says {found}: echo {good[0]} > {file}"
