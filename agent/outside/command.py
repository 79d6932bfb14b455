"""What the commands `source` and `destination` do where memory is a snapshot's or an outside VMM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from agent.daemon import run, shared
from agent.outside.outside_daemon import OutsideOptions, serve_outside
from agent.outside.snapshot_daemon import SnapshotOptions, serve_snapshot
from agent.security.options import credentials
from agent.together import SNAPSHOT_LISTEN
from postcopy.link.address import Address, UnixAddress


def run_snapshot(file: Path, rest: dict[str, Any]) -> NoReturn:
    """Serve the one file that the memory is."""
    options = SnapshotOptions(
        path=file,
        listen=rest["listen"] or SNAPSHOT_LISTEN,
        rate=rest["rate"],
        tls=credentials(
            rest["listen"] or SNAPSHOT_LISTEN, rest["tls_dir"], insecure=rest["insecure"], allow=rest["allow"]
        ),
        **shared(rest),
    )
    run("source", serve_snapshot(options))


def run_outside(handover: UnixAddress, listen: Address, fetch: Address | None, rest: dict[str, Any]) -> NoReturn:
    """Serve processes that hand their memory over."""
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
