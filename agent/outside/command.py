"""What the commands `source` and `destination` do where memory is a snapshot's or an outside VMM's."""

from __future__ import annotations

from typing import Any, NoReturn

import click

from agent.daemon import run, shared
from agent.outside.outside_daemon import OutsideOptions, serve_outside
from agent.outside.snapshot_daemon import SnapshotOptions, serve_snapshot
from agent.parameters import Memory
from agent.security.options import credentials
from postcopy.errors import UsageError
from postcopy.link.address import Address, TcpAddress, UnixAddress

SNAPSHOT_LISTEN = TcpAddress("127.0.0.1", 0)


def run_snapshot(memory: tuple[Memory, ...], rest: dict[str, Any]) -> NoReturn:
    """Serve the one file that the memory is."""
    if len(memory) != 1 or memory[0].place is None:
        raise UsageError(
            "a snapshot is one file, as an absolute path: --memory file:/PATH, and no other memory beside it"
        )
    for name in ("keeper", "resume"):
        if rest[name]:
            raise UsageError(f"--{name} is for guests that leave this agent; a snapshot's memory is its file")
    options = SnapshotOptions(
        path=memory[0].place,
        listen=rest["listen"] or SNAPSHOT_LISTEN,
        rate=rest["rate"],
        tls=credentials(
            rest["listen"] or SNAPSHOT_LISTEN, rest["tls_dir"], insecure=rest["insecure"], allow=rest["allow"]
        ),
        **shared(rest),
    )
    run("source", serve_snapshot(options))


def run_outside(handover: Address, listen: Address, fetch: Address | None, rest: dict[str, Any]) -> NoReturn:
    """Serve processes that hand their memory over."""
    if not isinstance(handover, UnixAddress):
        raise UsageError(f"--handover {handover}: descriptors travel over a Unix socket: write unix:PATH")
    if rest["keeper"]:
        raise UsageError("--keeper is for guests that leave this agent; what outlives one of --handover is by --keep")
    if fetch is None and rest["no_push"]:
        raise UsageError(
            "--no-push is for a source that is fetched from (--from); one that dials has it with `migrate`"
        )
    if fetch is not None and given("listen"):
        raise UsageError("--from and --listen: with --from this agent dials, and no source dials it")
    options = OutsideOptions(
        handover=handover,
        fetch=fetch,
        listen=listen if fetch is None else None,
        push=not rest["no_push"],
        keep=rest["keep"],
        tls=credentials(
            listen if fetch is None else fetch, rest["tls_dir"], insecure=rest["insecure"], allow=rest["allow"]
        ),
        **shared(rest),
    )
    run("destination", serve_outside(options))


def given(name: str) -> bool:
    """Say whether somebody asked for this option, in whatever way."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in {None, click.core.ParameterSource.DEFAULT}
