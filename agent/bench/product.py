"""The product's side of a measurement: one migration between two real daemons, as `postcopy demo` runs it.

A setup enters; the report of the migration leaves, with the verdict of a check of every byte, what Prometheus was told,
and how much memory the daemons took for themselves. What is wrong with it is said in `problems`.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.admin import ask
from agent.bench.link import Link
from agent.bench.scrape import Scraped, metrics_address, scrape, scraping
from agent.bench.windows import WINDOW_NS, figures_of_windows
from agent.children import ChildError, Daemon
from postcopy.errors import PostcopyError
from postcopy.link.address import UnixAddress
from postcopy.link.report import with_check

LOOK_SECONDS = 0.01
TRACE = "faults.trace"
TRACE_SECONDS = 10.0
SAMPLE_SECONDS = 0.02
# The guest has to be seen running at the source before it leaves.
SOURCE_STEPS = 10


@dataclass(frozen=True, slots=True)
class ProductSetup:
    """One migration. Sizes are bytes; `steps` limits each vCPU's steps in all; `holes`: blank pages are all holes.

    `folder` is where memory of tmpfs or hugetlbfs lies, at both ends; `thp` asks for transparent huge pages.
    Without `push` the guest fetches every page by touching it, so the migration ends by itself where `blank` is 0.
    `scrapes_per_second`: how often both daemons' metrics are read meanwhile; with `windows` only in every other one,
    whose faults are told from the others'. `tls`: with certificates made for it. `trace`: the destination records each
    fault.
    With `handover` no page is sent: the memory goes with its files. In mode minor each first touch is trapped then, and
    the run goes on until the guest has touched every page.
    """

    memory: str = "shmem"
    size: int = 64 << 20
    mode: str = "auto"
    vcpus: int = 1
    push: bool = True
    blank: float = 0.0
    holes: bool = False
    steps: int | None = None
    steps_per_second: int = 0
    poll_max_ns: int | None = None
    watch_memory: bool = False
    scrapes_per_second: int = 0
    windows: bool = False
    thp: bool = False
    folder: str | None = None
    tls: bool = False
    handover: bool = False
    trace: bool = False
    deadline: float = 60.0

    @property
    def data(self) -> int:
        """Bytes of the memory that are not blank."""
        return int(self.size * (1 - self.blank))

    @property
    def copies(self) -> int:
        """How many ends have that data: what is handed over is there once."""
        return 1 if self.handover else 2


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the daemons run: commands that go before theirs, and the address the destination listens on."""

    source: tuple[str, ...] = ()
    destination: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    pinning: str = "none"

    @classmethod
    def on_cpus(cls, source: str, destination: str) -> Placement:
        """Keep each daemon on the CPUs of a list as taskset(1) takes it."""
        pins = (("taskset", "-c", source), ("taskset", "-c", destination))
        return cls(*pins, pinning=f"source {source}, destination {destination}")

    @property
    def reachable(self) -> bool:
        """Whether the daemons' loopback is the bench's, too."""
        return self.host.startswith("127.")

    def through(self, link: Link) -> Placement:
        """Put a link between the daemons."""
        enter = ("ip", "netns", "exec")
        return Placement(
            (*enter, link.source, *self.source), (*enter, link.destination, *self.destination), link.host, self.pinning
        )


@dataclass(slots=True)
class ProductRun:
    """What one migration came to. `own_bytes` is the most that either daemon held beside the guest's memory.

    `touches` is how long first touches took that were trapped after all was handed over. `windows` has the figures of
    those in which metrics were read.
    """

    report: dict[str, Any]
    stall_p99_per_vcpu: list[float] = field(default_factory=list)
    own_bytes: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    resident_before_push: int | None = None
    touched_before_push: int | None = None
    touches: dict[str, float] | None = None
    scraped: Scraped = field(default_factory=Scraped)
    windows: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pair:
    """Both daemons of a migration, and how to reach them."""

    source: Daemon
    destination: Daemon
    sockets: dict[str, UnixAddress]
    folder: Path

    def log(self, role: str) -> str:
        """Return what one of them has said."""
        return (self.folder / f"{role}.log").read_text(errors="replace")

    async def status(self, role: str) -> dict[str, Any]:
        """Ask one of them how it stands."""
        return await ask(self.sockets[role], "status")

    async def until(self, role: str, wanted: Callable[[dict[str, Any]], bool], seconds: float) -> dict[str, Any]:
        """Return the first status that is as wanted; ChildError after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while not wanted(status := await self.status(role)):
                    await asyncio.sleep(LOOK_SECONDS)
        except TimeoutError:
            raise ChildError(f"the {role} did not get there within {seconds:g} s", 1) from None
        return status


async def run_product(setup: ProductSetup, placement: Placement) -> ProductRun:
    """Migrate once between fresh daemons, check every byte, and end them; PostcopyError with their last words."""
    async with daemons(setup, placement) as pair:
        try:
            async with asyncio.timeout(setup.deadline):
                await pair.until("source", lambda status: min(status["guest"]["steps"]) >= SOURCE_STEPS, setup.deadline)
                async with own_memory(pair) if setup.watch_memory else nothing() as own_bytes:
                    run = await _migrate(setup, pair)
                run.own_bytes = own_bytes
                if setup.handover and setup.mode == "minor":
                    run.touches = await _touched(setup, pair)
                if setup.windows:
                    run.windows = figures_of_windows(await _traced(pair), run.scraped)
                run.metrics = await scrape(metrics_address(pair.log("destination"))) if placement.reachable else {}
                return await _checked(setup, pair, run, placement.pinning)
        except TimeoutError:
            raise ChildError(f"the migration was not done within {setup.deadline:g} s", 1) from None
        except PostcopyError as error:
            words = [f"{daemon.name}: {daemon.last_words()}" for daemon in (pair.source, pair.destination)]
            raise ChildError(f"{error} ({'; '.join(words)})", error.exit_status) from error


@asynccontextmanager
async def daemons(setup: ProductSetup, placement: Placement) -> AsyncIterator[Pair]:
    """Start both daemons and always reap them."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="postcopy-bench-")))
        sockets = {role: UnixAddress(str(folder / f"{role}.sock")) for role in ("source", "destination")}
        poll = [] if setup.poll_max_ns is None else ["--poll-max-ns", str(setup.poll_max_ns)]
        started = {}
        for role, arguments, prefix in (
            ("destination", _destination_arguments(setup, placement, folder), placement.destination),
            ("source", _source_arguments(setup), placement.source),
        ):
            told = [*arguments, *_security(setup, placement, role, folder), "--admin", str(sockets[role]), *poll]
            daemon = Daemon(role, told, folder / f"{role}.log", prefix)
            started[role] = await stack.enter_async_context(daemon)
        yield Pair(started["source"], started["destination"], sockets, folder)


def _destination_arguments(setup: ProductSetup, placement: Placement, folder: Path) -> list[str]:
    listen = f"unix:{folder}/memory.sock" if setup.handover else f"tcp:{placement.host}:0"
    arguments = ["--listen", listen, "--mode", setup.mode, "--metrics", "127.0.0.1:0"]
    if setup.folder is not None:
        arguments += ["--memory-dir", setup.folder]
    if setup.trace or setup.windows:
        arguments += ["--trace", str(folder / TRACE)]
    return arguments


def _security(setup: ProductSetup, placement: Placement, role: str, folder: Path) -> list[str]:
    """Return what a daemon is told of encryption; the certificates are made for whoever is started first."""
    if not setup.tls:
        return ["--insecure"] if role == "destination" and not placement.reachable else []
    from agent.security.certificates import make_trial  # noqa: PLC0415 - for whoever asks for it

    certificates = folder / "tls"
    if not certificates.exists():
        make_trial(certificates, placement.host)
    return ["--tls-dir", str(certificates)]


def _source_arguments(setup: ProductSetup) -> list[str]:
    memory = setup.memory if setup.folder is None else f"{setup.memory}:{setup.folder}"
    arguments = ["--memory", memory, "--size", str(setup.size), "--vcpus", str(setup.vcpus)]
    arguments += ["--steps-per-second", str(setup.steps_per_second), "--blank", str(setup.blank)]
    if setup.holes:
        arguments.append("--holes")
    if setup.scrapes_per_second:
        arguments += ["--metrics", "127.0.0.1:0"]
    if setup.thp:
        arguments.append("--thp")
    return arguments if setup.steps is None else [*arguments, "--steps", str(setup.steps)]


async def _migrate(setup: ProductSetup, pair: Pair) -> ProductRun:
    address = (await pair.status("destination"))["address"]
    arguments = {"to": address, "push": setup.push, "rate": None, "timeout": None, "insecure": not setup.tls}
    migration = asyncio.create_task(ask(pair.sockets["source"], "migrate", arguments))
    found: dict[str, int | None] = {"resident_before_push": None, "touched_before_push": None}
    try:
        if not setup.push and setup.steps is not None:
            found = await _rest(setup, pair, migration)
            await ask(pair.sockets["source"], "set", {"push": True})
        addresses = [metrics_address(pair.log(role)) for role in pair.sockets] if setup.scrapes_per_second else []
        window_ns = WINDOW_NS if setup.windows else 0
        async with scraping(addresses, setup.scrapes_per_second, window_ns=window_ns) as scraped:
            report = await migration
    finally:
        migration.cancel()
        with contextlib.suppress(asyncio.CancelledError, PostcopyError):
            await migration
    await pair.until("destination", lambda status: bool(status["state"] == "completed"), setup.deadline)
    return ProductRun(report, scraped=scraped, **found)  # type: ignore[arg-type]


async def _touched(setup: ProductSetup, pair: Pair) -> dict[str, float]:
    """Wait until the guest has touched every page of trapped memory; return how long its touches took."""

    def all_touched(status: dict[str, Any]) -> bool:
        return bool(status["fault_latency_seconds"]["count"] >= status["pages"]["total"])

    status = await pair.until("destination", all_touched, setup.deadline)
    found: dict[str, float] = status["fault_latency_seconds"]
    return found


async def _traced(pair: Pair) -> Path:
    """Wait until the destination has written its trace."""
    async with asyncio.timeout(TRACE_SECONDS):
        while "are in the trace" not in pair.log("destination"):
            await asyncio.sleep(LOOK_SECONDS)
    return pair.folder / TRACE


async def _rest(setup: ProductSetup, pair: Pair, migration: asyncio.Task[dict[str, Any]]) -> dict[str, int | None]:
    """Wait until the guest has made its last step at the destination; return what is resident, what it touched."""

    def at_rest(status: dict[str, Any]) -> bool:
        return migration.done() or (status["guest"] is not None and min(status["guest"]["steps"]) == setup.steps)

    status = await pair.until("destination", at_rest, setup.deadline)
    if migration.done():
        await migration
    return {
        "resident_before_push": status["pages"]["placed"],
        "touched_before_push": status["guest"]["accesses"],
    }


async def _checked(setup: ProductSetup, pair: Pair, run: ProductRun, pinning: str) -> ProductRun:
    """Add the check of every byte and what the guest's threads felt one by one."""
    status = await pair.status("destination")
    run.stall_p99_per_vcpu = list(status["guest"].get("stall_p99_seconds", []))
    found = await ask(pair.sockets["destination"], "check")
    run.report = with_check(run.report, found["pages_checked"], found["pages_mismatched"])
    run.report["environment"] = {**run.report["environment"], "pinning": pinning}
    if found["pages_checked"] * 4096 != setup.size:
        raise ChildError(f"the check looked at {found['pages_checked']} pages of {setup.size // 4096}", 1)
    return run


@asynccontextmanager
async def nothing() -> AsyncIterator[dict[str, int]]:
    """Watch nothing: looking takes time from what is measured."""
    yield {}


@asynccontextmanager
async def own_memory(pair: Pair) -> AsyncIterator[dict[str, int]]:
    """Watch, while the block runs, how much memory each daemon holds that is not the guest's."""
    most = {"source": 0, "destination": 0}

    async def watch() -> None:
        pids = {role: (await pair.status(role))["pid"] for role in most}
        while True:
            for role, pid in pids.items():
                most[role] = max(most[role], own_bytes(pid))
            await asyncio.sleep(SAMPLE_SECONDS)

    watching = asyncio.create_task(watch())
    try:
        yield most
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError, PostcopyError):
            await watching


def own_bytes(pid: int) -> int:
    """Return resident anonymous and file memory of a process; the guest's, a memfd, counts as neither."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(("RssAnon:", "RssFile:")):
                total += int(line.split()[1]) * 1024
    return total
