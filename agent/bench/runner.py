"""Runs scenarios: product and floor in turns, on a warmed machine, with a look at what else it did meanwhile.

Scenarios enter; what each run came to leaves, round by round, so that whoever stops early has something of everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import uvloop

from agent.bench import checks
from agent.bench.figures import figures_of, starvation
from agent.bench.floor import FloorResult, FloorSetup, run_floor
from agent.bench.link import RATE_BYTES, Link, link
from agent.bench.machine import Load, Sample
from agent.bench.product import Placement, ProductRun, ProductSetup, run_product
from agent.bench.scenarios import Scenario
from agent.bench.warm import Warm
from postcopy.errors import PostcopyError
from postcopy.pump.histogram import Histogram

# A scenario that failed this often is left alone.
FAILURES_MAX = 2
# What the first pair of a scenario may be expected to take.
FIRST_PAIR_SECONDS = 5.0


@dataclass(slots=True)
class Runs:
    """The runs of one kind: figures, the account each was reduced from, what disturbed it."""

    figures: list[dict[str, float]] = field(default_factory=list)
    accounts: list[dict[str, Any]] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, account: dict[str, Any], figures: dict[str, float], load: Load) -> None:
        """Take a run in."""
        self.figures.append(figures)
        self.accounts.append(account)
        self.loads.append(load)


@dataclass(slots=True)
class Measured:
    """A scenario and all its runs."""

    scenario: Scenario
    product: Runs = field(default_factory=Runs)
    floors: dict[str, Runs] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long its latest pair took, with the memory that was found for it, or its first may take."""
        return self.product.seconds + sum(runs.seconds for runs in self.floors.values()) or FIRST_PAIR_SECONDS

    @property
    def disturbed(self) -> int:
        """How many of its runs were disturbed."""
        return sum(load.disturbed for runs in (self.product, *self.floors.values()) for load in runs.loads)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured: `pairs` of runs of each scenario, none begun that would not end before `seconds`.

    `source_cpus` and `destination_cpus` pin both ends of product and floor alike, bit masks; 0 pins nothing.
    """

    pairs: int = 5
    seconds: float | None = None
    source_cpus: int = 0
    destination_cpus: int = 0

    @property
    def placement(self) -> Placement:
        """Where the product's daemons run."""
        if not self.source_cpus or not self.destination_cpus:
            return Placement()
        return Placement.on_cpus(_cpu_list(self.source_cpus), _cpu_list(self.destination_cpus))


Tell = Callable[[str, int, int], None]  # what is run now, how many runs are done, of how many


class Bench:
    """One bench: its plan, and whom to tell what is being run."""

    def __init__(self, plan: Plan, tell: Tell) -> None:
        self.interrupted = False
        self._plan = plan
        self._tell = tell
        self._done = self._total = 0
        self._network: Link | None = None
        self._warm = Warm()

    def run(self, scenarios: list[Scenario]) -> list[Measured]:
        """Run all scenarios; what went wrong with one is in its `failures`. Ctrl-C ends it with what there is."""
        measured = [Measured(scenario, floors={name: Runs() for name in scenario.floors}) for scenario in scenarios]
        self._total = self._plan.pairs * sum(1 + len(one.floors) for one in measured)
        began = time.monotonic()
        with ExitStack() as stack:
            stack.enter_context(self._warm)
            try:
                for one in measured * self._plan.pairs:
                    if len(one.failures) < FAILURES_MAX and self._time_for(one, time.monotonic() - began):
                        self._pair(one, stack)
                    else:
                        self._done += 1 + len(one.floors)
            except KeyboardInterrupt:
                self.interrupted = True
        return measured

    def _time_for(self, one: Measured, spent: float) -> bool:
        return self._plan.seconds is None or spent + one.seconds <= self._plan.seconds

    def _pair(self, one: Measured, stack: ExitStack) -> None:
        """Run the product once, then each of the floors once."""
        done = self._done + 1 + len(one.floors)
        try:
            if one.scenario.on_link and self._network is None:
                self._network = stack.enter_context(link())
            self._product(one)
            for name, setup in one.scenario.floors.items():
                self._floor(one, name, setup)
        except PostcopyError as error:
            one.failures.append(str(error))
        self._done = done

    def _product(self, one: Measured) -> None:
        """Migrate once and take the run in."""
        self._tell(f"{one.scenario.name}: product", self._done, self._total)
        setup, placement = one.scenario.product, self._plan.placement
        if one.scenario.on_link and self._network is not None:
            placement = placement.through(self._network)
        began = time.monotonic()
        self._warm.find(setup.memory, setup.data, copies=setup.copies, thp=setup.thp)
        before = Sample.take()
        run = uvloop.run(run_product(setup, placement))
        after = Sample.take()
        one.product.seconds = time.monotonic() - began
        figures = product_figures(run, setup, on_link=one.scenario.on_link)
        load = before.until(after)
        one.product.add(run.report, figures, load)
        pushes = setup.push or setup.steps is not None
        found = checks.complaints(run.report, run.metrics, vcpus=setup.vcpus, push=pushes, disturbed=load.disturbed)
        if run.resident_before_push is not None and run.touched_before_push is not None:
            demand = run.report["pages"]["demand"]
            found += checks.residency(run.resident_before_push, run.touched_before_push, demand)
        found += checks.scraping(run.scraped.answers, run.scraped.wanted)
        one.problems += [f"run {len(one.product.figures)}: {complaint}" for complaint in found]
        self._done += 1

    def _floor(self, one: Measured, name: str, setup: FloorSetup) -> None:
        """Run one of the floors once and take the run in."""
        self._tell(f"{one.scenario.name}: floor, {name}", self._done, self._total)
        plan, memory = self._plan, one.scenario.product.memory
        setup = replace(setup, source_cpus=plan.source_cpus, destination_cpus=plan.destination_cpus)
        if one.scenario.on_link and self._network is not None:
            source, destination = Link.path(self._network.source), Link.path(self._network.destination)
            setup = replace(setup, source_netns=source, destination_netns=destination, host=self._network.host)
        began = time.monotonic()
        self._warm.find(memory, setup.size, thp=one.scenario.product.thp)
        before = Sample.take()
        result = run_floor(setup)
        after = Sample.take()
        account = floor_account(name, setup, result, memory)
        runs = one.floors[name]
        runs.seconds = time.monotonic() - began
        runs.add(account, floor_figures(account, setup, result, on_link=one.scenario.on_link), before.until(after))
        resident = result.pages_touched if setup.push == "none" else setup.size // setup.page_size
        one.problems += checks.floor_complaints(
            result.pages_checked, result.pages_mismatched, result.pages_resident, resident
        )
        self._done += 1


def product_figures(run: ProductRun, setup: ProductSetup, *, on_link: bool) -> dict[str, float]:
    """Reduce a run of the product to figures."""
    figures = figures_of(run.report)
    if setup.vcpus > 1 and len(run.stall_p99_per_vcpu) == setup.vcpus:
        figures["starvation"] = starvation(run.stall_p99_per_vcpu)
    if run.touches is not None:
        figures["fault_p50"], figures["fault_p99"] = run.touches["p50"], run.touches["p99"]
    if run.own_bytes:
        figures["own_bytes"] = float(max(run.own_bytes.values()))
    figures |= run.windows
    if on_link:
        _share(figures, run.report)
    return figures


def floor_account(name: str, setup: FloorSetup, result: FloorResult, memory: str) -> dict[str, Any]:
    """Give a floor's run the shape of a report."""
    total = setup.size // setup.page_size
    # Without books the floor sends twice what is asked for and pushed, which is no throughput.
    placed = (result.pages_demand + result.pages_push) * setup.page_size
    return {
        "way": name,
        "memory": [{"type": memory, "page_size": setup.page_size, "size_bytes": setup.size}],
        "resident_seconds": result.wall_seconds,
        "fault_latency_seconds": _summary(result.latency),
        "stall_seconds": result.stall.summary(),
        "pages": {"total": total, "demand": result.pages_demand, "push": result.pages_push},
        "bytes": {"wire": result.bytes_wire},
        "throughput_bytes_per_second": placed / result.wall_seconds,
        "cpu_seconds": {"source": result.source_cpu_seconds, "destination": result.destination_cpu_seconds},
        "integrity": {"pages_checked": result.pages_checked, "pages_mismatched": result.pages_mismatched},
    }


def floor_figures(
    account: dict[str, Any], setup: FloorSetup, result: FloorResult, *, on_link: bool
) -> dict[str, float]:
    """Reduce a run of the floor to figures."""
    figures = figures_of(account)
    if setup.touchers > 1:
        figures["starvation"] = starvation([stall.quantile(0.99) for stall in result.stall_per_toucher])
    if on_link:
        _share(figures, account)
    return figures


def _summary(latency: Histogram) -> dict[str, float]:
    summary = latency.summary()
    del summary["sum"]
    return summary


def _share(figures: dict[str, float], account: dict[str, Any]) -> None:
    """Add what part of the link the push used: its pages alone, without headers and without demand pages."""
    bytes_pushed = account["pages"]["push"] * account["memory"][0]["page_size"]
    figures["link_share"] = bytes_pushed / account["resident_seconds"] / RATE_BYTES


def _cpu_list(mask: int) -> str:
    return ",".join(str(cpu) for cpu in range(mask.bit_length()) if mask >> cpu & 1)
