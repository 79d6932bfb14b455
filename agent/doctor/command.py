"""`postcopy doctor`, as click sees it: needs and a destination to compare with enter; a table or one object leaves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.parameters import ADDRESS, SIZE, json_option
from agent.security.options import credentials, insecure_option, tls_option
from postcopy.limits import VCPUS_MAX

if TYPE_CHECKING:
    from postcopy.link.address import Address

MEMORY = "shmem"
SIZE_BYTES = 256 << 20


@click.command()
@click.option("--need", "needs", multiple=True, metavar="TYPE:MODE", help="Fail unless this works: shmem:minor.")
@click.option("--peer", type=ADDRESS, metavar="tcp:HOST:PORT", help="Compare with that destination's host.")
@click.option("--memory", metavar="TYPE", help=f"With --peer: the memory that would migrate.  [default: {MEMORY}]")
@click.option("--size", type=SIZE, help="With --peer: how much of it.  [default: 256MiB]")
@click.option(
    "--mode", metavar="NAME", help="With --peer: how pages are to be placed.  [default: as the destination does]"
)
@click.option("--guest", metavar="KIND", help="With --peer: the guest's kind, emulated or kvm.  [default: emulated]")
@click.option(
    "--vcpus", type=click.IntRange(1, VCPUS_MAX), metavar="N", help="With --peer: the guest's vCPUs.  [default: 1]"
)
@tls_option
@insecure_option
@json_option
def doctor(
    needs: tuple[str, ...], peer: Address | None, tls_dir: Path | None, insecure: bool, as_json: bool, **migration: Any
) -> None:
    """Say what this host can do, and how to mend the rest.

    Everything is tried, nothing is concluded from a version. With --peer it also says whether a migration to that
    destination would work, without making one.

    Modes for --need are missing, minor (shmem, hugetlb), move (anonymous) and wp.
    """
    from agent.doctor import needs as asked  # noqa: PLC0415 - not for --help, here and below
    from agent.doctor.peer import compare, migration_of  # noqa: PLC0415
    from agent.doctor.problems import problems_of  # noqa: PLC0415
    from agent.doctor.render import show  # noqa: PLC0415
    from agent.output import print_json  # noqa: PLC0415
    from postcopy.errors import HostError, UsageError  # noqa: PLC0415
    from postcopy.link.host import describe_host  # noqa: PLC0415

    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        logging.getLogger("postcopy").setLevel(logging.ERROR)  # what goes wrong is said once
    wanted = [asked.parse_need(text) for text in needs]
    if peer is None and any(value is not None for value in migration.values()):
        raise UsageError("--memory, --size, --mode, --guest and --vcpus say what would migrate: they go with --peer")
    if peer is not None:
        tls = credentials(peer, tls_dir, insecure=insecure)
        journey = migration_of(migration["memory"] or MEMORY, migration["size"] or SIZE_BYTES, migration)
    host = describe_host()
    found = [asked.check(need, host) for need in wanted]
    document: dict[str, Any] = {
        "schema_version": 1,
        **host,
        "problems": problems_of(host),
        "needs": found,
        "peer": compare(host, peer, journey, tls) if peer is not None else None,
    }
    if as_json:
        print_json(document)
    else:
        show(document)
    lacking = [f"{one['need']}: {one['reason']}" for one in found if not one["met"]]
    if lacking:
        raise HostError(f"needed and missing here: {'; '.join(lacking)}")
    if peer is not None and not document["peer"]["works"]:
        raise HostError(f"a migration to {peer} would not work: {document['peer']['reason']}")
