"""`postcopy certs`, as click sees it: names of hosts enter; folders with certificates leave."""

from __future__ import annotations

from pathlib import Path

import click

from agent.parameters import json_option
from postcopy.limits import CERTIFICATE_DAYS_MAX


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("hosts", nargs=-1, required=True, metavar="HOST...")
@click.option(
    "--days",
    type=click.IntRange(1, CERTIFICATE_DAYS_MAX),
    default=365,
    show_default=True,
    metavar="DAYS",
    help="How long they are valid.",
)
@json_option
def certs(directory: Path, hosts: tuple[str, ...], days: int, as_json: bool) -> None:
    """Make certificates, signed by a CA of your own.

    They are for encrypted migrations; the CA and all they need lie in DIRECTORY. HOST is a name or an address, or
    several of the same host with commas between them: b.example,10.0.0.2. Each host gets a folder DIRECTORY/HOST that
    goes there whole, and is what --tls-dir wants. A CA that is in DIRECTORY already signs for further hosts.
    """
    from agent.output import print_json, print_rows  # noqa: PLC0415 - not for --help, here and below
    from agent.security import certificates  # noqa: PLC0415
    from postcopy.errors import UsageError  # noqa: PLC0415

    wanted = [certificates.parse_host(host) for host in hosts]
    folders = [directory / names[0] for names in wanted]
    taken = [str(folder) for folder in folders if folder.exists()]
    if taken:
        raise UsageError(f"{', '.join(taken)}: there already, and nothing is written over")
    if len(set(folders)) < len(folders):
        raise UsageError("a host is named twice: write all names of one host with commas between them")
    authority = certificates.authority_in(directory, days)
    validity = certificates.Validity.of_days(days)
    for folder, names in zip(folders, wanted, strict=True):
        certificates.make_host(folder, authority, names, validity)
    document = {
        "schema_version": 1,
        "authority": str(directory / certificates.AUTHORITY_CERT),
        "valid_until": validity.end.isoformat(timespec="seconds"),
        "hosts": [{"names": names, "folder": str(folder)} for folder, names in zip(folders, wanted, strict=True)],
    }
    if as_json:
        print_json(document)
        return
    print_rows(
        [
            ("CA", f"{directory / certificates.AUTHORITY_CERT}; its key lies beside it: keep that secret"),
            *((folder.name, f"{folder}/ -> --tls-dir on that host") for folder in folders),
            ("valid until", validity.end.strftime("%Y-%m-%d")),
        ]
    )
