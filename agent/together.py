"""What the options of a command are together, whatever each of them is alone: judged before anything begins.

What click says of `source`, `destination` or `demo` enters, with its context; UsageError leaves, which names the flag,
the variable, or the line of a file to change. What only the host knows waits until it is used. `config check` asks
too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from agent.config.origin import named
from agent.parameters import PLACED, SNAPSHOT, Memory
from agent.security import options
from postcopy.errors import UsageError
from postcopy.guest.kinds import WorkloadKind, kind_named
from postcopy.guest.state import GUEST_PAGE_BYTES
from postcopy.guest.vcpus import pages_of
from postcopy.kernel import memory_type_at
from postcopy.link.address import Address, TcpAddress, UnixAddress
from postcopy.link.placement import handling, traps_handed_over
from postcopy.pages.regions import Region

SNAPSHOT_LISTEN = TcpAddress("127.0.0.1", 0)
PAGES_OF_SOME_GUEST = 1 << 20

Said = Mapping[str, Any]


def given(name: str) -> bool:
    """Say whether somebody asked for this option, in whatever way."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in {None, click.core.ParameterSource.DEFAULT}


def only_with(said: Said, words: str, *names: str) -> None:
    """Refuse options that are for something else."""
    for name in names:
        if said[name]:
            with named(name):
                raise UsageError(words)


def judge_source(said: Said) -> None:
    """Judge what `source` was told."""
    if SNAPSHOT in {one.type for one in said["memory"]}:
        judge_snapshot(said)
        return
    only_with(said, "it is for a snapshot, --memory file:/PATH", "listen", "rate", "insecure", "allow")
    if said["resume"] is None:
        judge_guest(said)


def judge_snapshot(said: Said) -> None:
    """Judge what the source of a snapshot was told."""
    memory = said["memory"]
    if len(memory) != 1 or memory[0].place is None:
        with named("memory"):
            raise UsageError("a snapshot is one file, as an absolute path: file:/PATH, and no other memory beside it")
    words = "it is for guests that leave this agent; a snapshot's memory is its file"
    only_with(said, words, "keeper", "resume")
    judge_encryption("listen", said["listen"] or SNAPSHOT_LISTEN, said)


def judge_guest(said: Said) -> None:
    """Judge the guest that was asked for: each of its options as any guest could have it, then with its memory."""
    kind = kind_named(said["guest"])
    for name in ("workload", "vcpus"):
        with named(name):
            kind.judge(PAGES_OF_SOME_GUEST, **{name: said[name]})
    for index, memory in enumerate(said["memory"]):
        with named("memory" if memory.size else "size"):
            judge_region(index, memory, said["size"])
    with named("memory" if all(memory.size for memory in said["memory"]) else "size"):
        judge_whole(kind, said)


def judge_region(index: int, memory: Memory, size: int) -> None:
    """Refuse a region that is no whole number of pages; how large those of a mount are, only the host knows."""
    placed = memory.type.partition("-")[0] in PLACED
    page_size = GUEST_PAGE_BYTES if placed else memory_type_at(memory.type, None).page_size
    Region(index, memory.type, page_size, memory.size or size)


def judge_whole(kind: WorkloadKind, said: Said) -> None:
    """Refuse memory that has no room for such a guest."""
    pages = pages_of([memory.size or said["size"] for memory in said["memory"]])
    fields = {name: said[name] for name in ("workload", "vcpus", "blank", "holes") if name in said}
    kind.judge(pages, **fields)


def judge_destination(said: Said) -> None:
    """Judge what `destination` was told."""
    if said["handover"] is not None:
        judge_outside(said)
        return
    only_with(said, "it is for outside VMMs, --handover", "fetch", "no_push", "keep")
    judge_encryption("listen", said["listen"], said)


def judge_outside(said: Said) -> None:
    """Judge what a destination of outside VMMs was told."""
    if not isinstance(said["handover"], UnixAddress):
        with named("handover"):
            raise UsageError(f"{said['handover']}: descriptors travel over a Unix socket: write unix:PATH")
    words = "it is for guests that leave this agent; what outlives one of --handover is by --keep"
    only_with(said, words, "keeper")
    if said["fetch"] is None:
        words = "it is for a source that is fetched from (--from); one that dials has it with `migrate`"
        only_with(said, words, "no_push")
    elif given("listen"):
        with named("listen"):
            raise UsageError("with --from this agent dials, and no source dials it")
    name = "listen" if said["fetch"] is None else "fetch"
    judge_encryption(name, said[name], said)


def judge_encryption(name: str, address: Address, said: Said) -> None:
    """Judge how connections to or at an address are encrypted."""
    encrypted = said["tls_dir"] is not None
    about = "insecure" if said["insecure"] and encrypted else "allow" if said["allow"] and not encrypted else name
    with named(about):
        options.judge(address, said["tls_dir"], insecure=said["insecure"], allow=said["allow"])


def judge_demo(said: Said) -> None:
    """Judge what `demo` was told, which runs both daemons."""
    if SNAPSHOT in {one.type for one in said["memory"]}:
        with named("memory"):
            raise UsageError("a snapshot has no guest that could be moved: it is for `source`")
    judge_guest(said)
    if said["handover"]:
        only_with(said, "memory is handed over through a Unix socket, which has no TLS", "tls")
    with named("mode"):
        if said["handover"]:
            traps_handed_over(said["mode"])
        else:
            for memory in said["memory"]:
                handling(said["mode"], memory.type)


JUDGES: dict[str, Callable[[Said], None]] = {
    "source": judge_source,
    "destination": judge_destination,
    "demo": judge_demo,
}
