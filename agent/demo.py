"""`postcopy demo`: the main job from end to end, with both daemons as real processes on this host.

Options enter; the report of one migration leaves, with the verdict of a check of every byte in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.admin import Tell, ask
from agent.children import ChildError, Daemon
from agent.output import say
from agent.parameters import Memory
from postcopy.errors import PostcopyError
from postcopy.limits import DEMO_SECONDS
from postcopy.link.address import UnixAddress
from postcopy.link.report import with_check

WARM_STEPS = 10_000
LOOK_SECONDS = 0.02
UNWRITTEN = "cannot be written"
"""What a destination says of a trace that has no room."""


@dataclass(frozen=True)
class DemoOptions:
    """What the command line of `postcopy demo` says. Every memory has its size; `rate` in bytes a second."""

    memory: tuple[Memory, ...]
    thp: bool
    guest: str
    vcpus: int
    workload: str
    seed: int
    mode: str
    handover: bool
    tls: bool
    push: bool
    seconds: float
    rate: int | None
    timeout: float | None
    keep_logs: Path | None
    trace: Path | None = None


async def run_demo(options: DemoOptions, tell: Tell) -> dict[str, Any]:
    """Migrate a guest from one daemon to another and check it; return the report. Children are always reaped."""
    async with AsyncExitStack() as stack:
        scratch = None
        if options.keep_logs is None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="postcopy-demo-")))
        folder = options.keep_logs or scratch or Path()
        security = _security(options, folder)
        sockets = {role: UnixAddress(str(folder / f"{role}.sock")) for role in ("source", "destination")}
        source = await stack.enter_async_context(
            Daemon("source", [*_source_arguments(options, sockets), *security], folder / "source.log", scratch=scratch)
        )
        destination = await stack.enter_async_context(
            Daemon(
                "destination",
                [*_destination_arguments(options, folder, sockets), *security],
                folder / "destination.log",
                scratch=scratch,
            )
        )
        try:
            report = await _migrate_and_check(options, sockets, tell)
        except PostcopyError as error:
            raise ChildError(with_last_words(str(error), source, destination), error.exit_status) from error
        await destination.end()
        for line in destination.lines_with(UNWRITTEN):
            say(line)
        return report


def _security(options: DemoOptions, folder: Path) -> list[str]:
    """Return what both daemons are told of encryption; certificates are made where they are wanted."""
    if not options.tls:
        return []
    from agent.security.certificates import make_trial  # noqa: PLC0415 - for whoever asks for it

    return ["--tls-dir", str(make_trial(folder / "tls", "127.0.0.1"))]


def with_last_words(text: str, *daemons: Daemon) -> str:
    """Add what the daemons said last, where it is not what is said already."""
    said, added = text, []
    for daemon in daemons:
        words = daemon.last_words()
        if words and words not in said:
            added.append(f"{daemon.name}: {words}")
            said += words
    return f"{text} ({'; '.join(added)})" if added else text


def _destination_arguments(options: DemoOptions, folder: Path, sockets: dict[str, UnixAddress]) -> list[str]:
    # What lies in a mount at the source goes into the same mount at the destination, without a name.
    places = [one.place for one in options.memory if one.place is not None]
    folders = dict.fromkeys(str(place if place.is_dir() else place.parent) for place in places)
    listen = f"unix:{folder}/memory.sock" if options.handover else "tcp:127.0.0.1:0"
    return [
        *("--listen", listen, "--mode", options.mode, "--admin", str(sockets["destination"])),
        *(word for folder in folders for word in ("--memory-dir", folder)),
        *(["--trace", str(options.trace.absolute())] if options.trace is not None else []),
    ]


def _source_arguments(options: DemoOptions, sockets: dict[str, UnixAddress]) -> list[str]:
    return [
        *(word for one in options.memory for word in ("--memory", str(one))),
        *(["--thp"] if options.thp else []),
        *("--guest", options.guest, "--vcpus", str(options.vcpus)),
        *("--workload", options.workload, "--seed", str(options.seed)),
        *("--admin", str(sockets["source"])),
    ]


async def _migrate_and_check(options: DemoOptions, sockets: dict[str, UnixAddress], tell: Tell) -> dict[str, Any]:
    source, destination = sockets["source"], sockets["destination"]
    address = (await ask(destination, "status"))["address"]
    await _wait_for(source, _has_run, "the guest does not run at the source", DEMO_SECONDS)
    memory = ", ".join(one.describe() for one in options.memory)
    say(f"the guest runs at the source ({memory}); it migrates to {address}")
    arguments = {"to": address, "push": options.push, "rate": options.rate, "timeout": options.timeout}
    migration = asyncio.create_task(ask(source, "migrate", arguments, tell))
    details: dict[str, Any] = {}
    try:
        if not options.push:
            details["resident_pages_before_push"] = await _run_without_push(options, destination, migration)
            await ask(source, "set", {"push": True})
        report = await migration
    finally:
        migration.cancel()
        with contextlib.suppress(asyncio.CancelledError, PostcopyError):
            await migration
    await _wait_for(destination, _is_whole, "the destination does not complete", DEMO_SECONDS)
    say("every page is at the destination; comparing every byte")
    found = await ask(destination, "check")
    report["details"] = {**report.get("details", {}), **details, "guest_steps": found["steps"]}
    return with_check(report, found["pages_checked"], found["pages_mismatched"])


async def _run_without_push(
    options: DemoOptions, destination: UnixAddress, migration: asyncio.Task[dict[str, Any]]
) -> int:
    """Let the guest fetch its pages by touching them, for as long as was asked; return how many came."""
    end = time.monotonic() + options.seconds
    status: dict[str, Any] = {"pages": {"placed": 0}}
    while not migration.done():
        status = await ask(destination, "status")
        if time.monotonic() >= end and status["state"] == "postcopy-active":
            break
        await asyncio.sleep(LOOK_SECONDS)
    return int(status["pages"]["placed"])


async def _wait_for(
    agent: UnixAddress, wanted: Callable[[dict[str, Any]], bool], complaint: str, seconds: float
) -> None:
    status: Callable[[], Awaitable[dict[str, Any]]] = lambda: ask(agent, "status")  # noqa: E731
    try:
        async with asyncio.timeout(seconds):
            while not wanted(await status()):
                await asyncio.sleep(LOOK_SECONDS)
    except TimeoutError:
        raise ChildError(f"{complaint} after {seconds:g} s", 1) from None


def _has_run(status: dict[str, Any]) -> bool:
    return bool(min(status["guest"]["steps"]) >= WARM_STEPS)


def _is_whole(status: dict[str, Any]) -> bool:
    return bool(status["state"] == "completed")
