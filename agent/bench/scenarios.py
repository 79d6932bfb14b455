"""The scenarios: what is migrated, what the floor does beside it, what must be reached. Only data and how it is chosen.

What the machine has (huge pages, memory) enters; scenarios leave, each with a reason if it cannot run here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from agent.bench import encryption
from agent.bench.floor import FloorSetup, Way
from agent.bench.machine import available_bytes
from agent.bench.memory_types import rows
from agent.bench.pool import free_pages
from agent.bench.product import SOURCE_STEPS, ProductSetup
from agent.bench.targets import FLOOR, Target
from postcopy.errors import UsageError
from postcopy.pages.units import format_size

MIB = 1 << 20
GIB = 1 << 30
HUGE = 2 * MIB
POLL_NS = 200_000  # the product's default
PAGE_SIZES = {"shmem": 4096, "hugetlb-2M": HUGE}
MODES = ("auto", "minor", "missing")
VCPUS = (1, 2, 4, 8, 16)
SCRAPES = (0, 10)
SIZES = (64 * MIB, 256 * MIB, GIB, 4 * GIB, 8 * GIB)
HANDOVER_SIZES = (64 * MIB, GIB, 8 * GIB)
# Of the huge pages that are free: both ends need theirs, and others may need some.
HUGE_SHARE = 0.45
HUGE_PAGES_MIN = 8
# So many let every scenario have its whole size, which is what --reserve-huge-pages reserves.
HUGE_PAGES = 1140
# A guest that is alive and touches next to nothing: of 1 GiB of 2 MiB pages, too, less than one in a hundred while they
# are pushed. Ten times as many would have each twentieth asked for, and that is no push alone any more.
IDLE_STEPS_PER_SECOND = 10
# On the link a fault takes half a millisecond: this many keep the demand pages' part of the link at 2 %.
LINK_STEPS_PER_SECOND = 500
# The guest of `size` is busy, and yet leaves the push a CPU.
SIZE_STEPS_PER_SECOND = 10_000
# A migration slower than this, in bytes a second, has gone wrong.
SLOWEST = 64 * MIB
# What a kind of scenario is about; the other figures of its runs say nothing (the downtime of a guest that rests).
LATENCY = ("fault_p50", "fault_p99")
FAULTS = (*LATENCY, "stall_p50", "stall_p99", "throughput", "cpu", "downtime")
STREAM = ("throughput", "cpu", "total")
VCPUS_FIGURES = (*FAULTS, "faults_per_second", "starvation")
LINK = ("link_share", *LATENCY, "stall_p50", "stall_p99", "throughput", "cpu", "total")
SIZE = ("downtime", "total", "throughput")
ASKED = ("asked_p50", "asked_p99")
HANDOVER = ("downtime", "total", "stall_p50", "stall_p99")


@dataclass(frozen=True, slots=True)
class Scenario:
    """One line of the table. `floors` by name; the best of them by the figures `by` is the floor.

    `figures` are what it is about. `lacking` says why it cannot run here. `middle` is the figure whose median run is
    shown whole.
    """

    name: str
    product: ProductSetup
    floors: dict[str, FloorSetup]
    targets: tuple[Target, ...] = ()
    by: tuple[str, ...] = LATENCY
    figures: tuple[str, ...] = FAULTS
    on_link: bool = False
    quick: bool = False
    lacking: str | None = None

    @property
    def middle(self) -> str:
        """Return the figure by which a run is in the middle of others."""
        return self.by[0]


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides which scenarios can run: bytes of memory to be had, free 2 MiB pages, whether sizes are cut."""

    available: int
    huge_pages: int
    quick: bool = False

    @classmethod
    def here(cls, *, quick: bool) -> Machine:
        """Return what this machine has now."""
        return cls(available_bytes(), free_pages(), quick)


def catalogue(machine: Machine) -> list[Scenario]:
    """Return all scenarios in the order of the table, with sizes that fit the machine."""
    found = [
        *_demand(machine),
        *_mixed(machine),
        *_stream(machine),
        *_vcpus(),
        _link(machine),
        *_sizes(machine),
        *_handover(machine),
        _sparse(),
        *_memory(),
        *_scraped(),
        *_traced(),
        *_types(machine),
        *_honest(),
        *_encryption(),
    ]
    return [_judged(scenario, machine) for scenario in found]


def choose(scenarios: Sequence[Scenario], patterns: Sequence[str], *, quick: bool) -> list[Scenario]:
    """Return those that a pattern names ("demand", "mixed/shmem", "stream/*/auto"); all, or the quick ones, for none.

    UsageError for a pattern that names none.
    """
    chosen = []
    for pattern in patterns:
        named = [one for one in scenarios if fnmatchcase(one.name, pattern) or fnmatchcase(one.name, f"{pattern}/*")]
        if not named:
            groups = ", ".join(dict.fromkeys(one.name.partition("/")[0] for one in scenarios))
            raise UsageError(f"no scenario is called {pattern!r}: there are {groups}, and parts like demand/shmem/auto")
        chosen += named
    wanted = chosen if patterns else scenarios
    return [one for one in scenarios if one in wanted and (one.quick or patterns or not quick)]


def _judged(scenario: Scenario, machine: Machine) -> Scenario:
    """Say what the machine lacks for a scenario."""
    product = scenario.product
    if scenario.lacking is not None or product.memory.startswith("hugetlb-1G"):
        return scenario
    if product.memory == "hugetlb-2M":
        if machine.huge_pages < 2 * HUGE_PAGES_MIN:
            free = f"{machine.huge_pages} huge pages of 2 MiB are free"
            needed = f"{2 * HUGE_PAGES_MIN} are needed, {HUGE_PAGES} for the whole"
            return replace(scenario, lacking=f"{free}, {needed}: --reserve-huge-pages, or vm.nr_hugepages")
    else:
        bytes_needed = product.copies * product.data + product.data // 4
        if bytes_needed > machine.available:
            free = f"{format_size(machine.available)} of memory are available"
            return replace(scenario, lacking=f"{free}, {format_size(bytes_needed)} are needed")
    return scenario


def _size(memory: str, machine: Machine, shmem: int, huge: int | None = None) -> int:
    """Return the size of a memory: of huge pages `huge` bytes, or as `shmem`, or what part of that the machine has."""
    if memory == "shmem":
        return shmem
    wanted = (shmem if huge is None else huge) // HUGE
    return max(HUGE_PAGES_MIN, min(wanted, int(machine.huge_pages * HUGE_SHARE))) * HUGE


def _kinds() -> Iterator[tuple[str, str]]:
    yield from ((memory, mode) for memory in PAGE_SIZES for mode in MODES)


def _ways(memory: str, mode: str) -> tuple[Way, ...]:
    """Return the ways a page may be placed in a mode: a forced mode has a floor of its own."""
    match mode:
        case "minor":
            return ("continue",)
        case "missing":
            return ("copy",)
        case _:
            return ("copy", "continue") if memory == "shmem" else ("continue", "copy")


def waiting(base: FloorSetup) -> dict[str, FloorSetup]:
    """Return both ways of waiting of a floor that places by `base.demand`."""
    return {f"{base.demand}, polls": replace(base, poll_ns=POLL_NS), f"{base.demand}, blocks": base}


def _demand(machine: Machine) -> Iterator[Scenario]:
    for memory, mode in _kinds():
        size = _size(memory, machine, 64 * MIB, 512 * MIB)
        floors: dict[str, FloorSetup] = {}
        for way in _ways(memory, mode):
            floors |= waiting(FloorSetup(size=size, page_size=PAGE_SIZES[memory], demand=way))
        targets: tuple[Target, ...]
        if memory == "hugetlb-2M":
            targets = (Target("fault_p50", "<=", 1.2, FLOOR),)
        elif mode == "auto":
            targets = (Target("fault_p50", "<=", 1.3, FLOOR), Target("fault_p99", "<=", 2.0, FLOOR))
        else:
            targets = (Target("fault_p50", "<=", 1.5, FLOOR),)
        product = ProductSetup(memory=memory, size=size, mode=mode, push=False)
        yield Scenario(f"demand/{memory}/{mode}", product, floors, targets, quick=mode == "auto")


def _mixed(machine: Machine) -> Iterator[Scenario]:
    for memory, mode in _kinds():
        size = _size(memory, machine, 128 * MIB if machine.quick else 256 * MIB, 512 * MIB)
        floors: dict[str, FloorSetup] = {}
        for way in _ways(memory, mode)[: 1 if memory == "shmem" else None]:
            floors |= waiting(FloorSetup(size=size, page_size=PAGE_SIZES[memory], demand=way, push=way))
        targets = (
            Target("fault_p50", "<=", 1.5, FLOOR),
            Target("fault_p99", "<=", 3.0, FLOOR),
            Target("stall_p99", "<=", plus=0.5e-3),
        )
        product = ProductSetup(memory=memory, size=size, mode=mode)
        quick = mode == "auto" and memory == "shmem"
        yield Scenario(f"mixed/{memory}/{mode}", product, floors, targets if memory == "shmem" else (), quick=quick)


def _stream(machine: Machine) -> Iterator[Scenario]:
    for memory, mode in _kinds():
        size = _size(memory, machine, 256 * MIB if machine.quick else GIB)
        base = FloorSetup(size=size, page_size=PAGE_SIZES[memory], touchers=0)
        floors = {f"{way}, 2 MiB frames": replace(base, push=way, frame_bytes=HUGE) for way in _ways(memory, mode)}
        if memory == "shmem":
            floors |= {f"{way}, 256 KiB frames": replace(base, push=way) for way in _ways(memory, mode)}
        if memory == "shmem" and mode == "auto" and not machine.quick:
            floors["write, 256 KiB frames"] = replace(base, push="write")
        # A forced mode is not held against the fastest of all ways: that is what forcing it costs.
        targets = (Target("throughput", ">=", 0.9, FLOOR), Target("cpu", "<=", 1.2, FLOOR)) if mode == "auto" else ()
        product = ProductSetup(memory=memory, size=size, mode=mode, steps_per_second=IDLE_STEPS_PER_SECOND)
        name, quick = f"stream/{memory}/{mode}", mode == "auto"
        yield Scenario(name, product, floors, targets, ("throughput",), STREAM, quick=quick)


def _vcpus() -> Iterator[Scenario]:
    for vcpus in VCPUS:
        floors = waiting(FloorSetup(size=64 * MIB, touchers=vcpus))
        targets = [Target("starvation", "<=", plus=5.0)] if vcpus > 1 else []
        if vcpus == VCPUS[-1]:
            targets.insert(0, Target("faults_per_second", ">=", 1.0, "vcpus/2"))
        product = ProductSetup(vcpus=vcpus, push=False)
        name, quick = f"vcpus/{vcpus}", vcpus in {2, VCPUS[-1]}
        yield Scenario(name, product, floors, tuple(targets), ("faults_per_second",), VCPUS_FIGURES, quick=quick)


def _link(machine: Machine) -> Scenario:
    size = 64 * MIB if machine.quick else 256 * MIB
    base = FloorSetup(size=size, push="copy", period_ns=1_000_000_000 // LINK_STEPS_PER_SECOND)
    # SO_SNDBUF is doubled by the kernel: these are 64 and 256 KiB of send buffer.
    floors = {"64 KiB send buffer": replace(base, send_bytes=32 * 1024)}
    if not machine.quick:
        floors["64 KiB send buffer, paced 950 Mbit/s"] = replace(base, send_bytes=32 * 1024, pacing=950_000_000 // 8)
        floors["256 KiB send buffer, paced 900 Mbit/s"] = replace(base, send_bytes=128 * 1024, pacing=900_000_000 // 8)
    targets = (
        Target("link_share", ">=", plus=0.9),
        Target("fault_p50", "<=", plus=0.5e-3),
        Target("fault_p99", "<=", plus=2e-3),
    )
    product = ProductSetup(size=size, steps_per_second=LINK_STEPS_PER_SECOND)
    return Scenario("link", product, floors, targets, LATENCY, LINK, on_link=True, quick=True)


def _sizes(machine: Machine) -> Iterator[Scenario]:
    for size in SIZES:
        deadline = 30.0 + size / SLOWEST
        product = ProductSetup(size=size, vcpus=2, steps_per_second=SIZE_STEPS_PER_SECOND, deadline=deadline)
        quick = size == SIZES[0] or (machine.quick and size == SIZES[1])
        name = f"size/{format_size(size).replace(' ', '')}"
        yield Scenario(name, product, {}, (Target("downtime", "<=", plus=2e-3),), ("downtime",), SIZE, quick=quick)


def _handover(machine: Machine) -> Iterator[Scenario]:
    """Memory handed over: small and large, of huge pages, trapped; and what cannot be handed over beside it, sent."""
    soon = (Target("downtime", "<=", plus=2e-3),)
    for size in HANDOVER_SIZES:
        product = ProductSetup(
            size=size, vcpus=2, steps_per_second=SIZE_STEPS_PER_SECOND, handover=True, deadline=30.0 + size / SLOWEST
        )
        name = f"handover/{format_size(size).replace(' ', '')}"
        yield Scenario(name, product, {}, soon, ("downtime",), HANDOVER, quick=size == HANDOVER_SIZES[0])
    huge = replace(product, memory="hugetlb-2M", size=_size("hugetlb-2M", machine, 0))
    yield Scenario("handover/hugetlb-2M", huge, {}, soon, ("downtime",), HANDOVER)
    trapped = ProductSetup(size=GIB, mode="minor", vcpus=1, handover=True)
    yield Scenario("handover/trapped", trapped, {}, soon, ("downtime",), (*HANDOVER, *LATENCY))
    sent = ProductSetup(memory="anonymous", size=GIB, vcpus=2, steps_per_second=SIZE_STEPS_PER_SECOND)
    yield Scenario("handover/anonymous-sent", sent, {}, (), ("downtime",), (*HANDOVER, *LATENCY))


def _sparse() -> Scenario:
    size = 256 * GIB
    product = ProductSetup(size=size, blank=1 - 64 * MIB / size, holes=True, steps_per_second=SIZE_STEPS_PER_SECOND)
    return Scenario("sparse", product, {}, (Target("total", "<=", plus=2.0),), ("total",), SIZE, quick=True)


def _encryption() -> Iterator[Scenario]:
    for what, name, product in encryption.pairs():
        by, figures = (("throughput",), STREAM) if what == "stream" else (LATENCY, FAULTS)
        yield Scenario(name, product, {}, (), by, figures)


def _memory() -> Iterator[Scenario]:
    sizes = (GIB, 4 * GIB)
    # A byte for each page that the larger guest has beyond the smaller one: of the allowance, and of what was measured.
    beyond = (sizes[1] - sizes[0]) / 4096
    allowed = (Target("own_bytes", "<=", plus=40 * MIB),)
    grown = (Target("own_bytes", "<=", plus=40 * MIB + beyond), Target("own_bytes", "<=", 1.0, "memory/1GiB", beyond))
    for size, targets in zip(sizes, (allowed, grown), strict=True):
        product = ProductSetup(size=size, steps_per_second=IDLE_STEPS_PER_SECOND, watch_memory=True)
        name = f"memory/{format_size(size).replace(' ', '')}"
        yield Scenario(name, product, {}, targets, ("own_bytes",), ("own_bytes",))


def _scraped() -> Iterator[Scenario]:
    """Migrate as `demand` does, long enough for some scrapes: without and with a Prometheus looking on, and in turns.

    Two migrations differ by more than a scrape costs: what it costs is seen within one, or in very many pairs.
    """
    for often in SCRAPES:
        product = ProductSetup(size=512 * MIB, push=False, scrapes_per_second=often)
        targets = (Target("fault_p99", "<=", 1.05, f"scraped/{SCRAPES[0]}"),) if often else ()
        yield Scenario(f"scraped/{often}", product, {}, targets, LATENCY, FAULTS)
    product = replace(product, size=GIB, windows=True)
    target = Target("asked_p99", "<=", plus=1.05)
    yield Scenario("scraped/in-turns", product, {}, (target,), LATENCY, (*FAULTS, *ASKED))


def _traced() -> Iterator[Scenario]:
    """Migrate as `demand` does, without and with a record of each fault."""
    for trace in (False, True):
        product = ProductSetup(size=256 * MIB, push=False, trace=trace)
        targets = (Target("fault_p99", "<=", 1.05, "traced/off"),) if trace else ()
        yield Scenario(f"traced/{'on' if trace else 'off'}", product, {}, targets, LATENCY, FAULTS)


def _types(machine: Machine) -> Iterator[Scenario]:
    for row in rows(machine.available):
        yield Scenario(f"types/{row.name}", row.product, row.floors, lacking=row.lacking)


def _honest() -> Iterator[Scenario]:
    """Migrations whose guest comes to rest before anything is pushed: what is resident then is what it touched."""
    still = ProductSetup(push=False, steps=SOURCE_STEPS)
    touching = ProductSetup(push=False, steps=1000, steps_per_second=2000)
    for name, product in (("honest/untouched", still), ("honest/touched", touching)):
        yield Scenario(name, product, {}, (), ("total",), (), quick=True)
