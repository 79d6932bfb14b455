"""What the command line says of encryption: options enter; credentials leave, or none where plain was asked for.

Beyond this host nothing travels in plain unless somebody says so, each time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from postcopy.link.address import Address
    from postcopy.link.tls import Credentials

tls_option = click.option(
    "--tls-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Encrypt, with the certificates and keys in DIR: see `postcopy certs`.",
)
insecure_option = click.option("--insecure", is_flag=True, help="Allow plain TCP, beyond this host, too.")
allow_option = click.option(
    "--allow",
    multiple=True,
    metavar="NAME",
    help="With --tls-dir: take guests from hosts with this name in their certificate only. Several are several names.",
)


def credentials(
    address: Address, tls_dir: Path | None, *, insecure: bool, allow: Sequence[str] = ()
) -> Credentials | None:
    """Return what connections to or at `address` are encrypted with, None for plain; UsageError where neither is."""
    judge(address, tls_dir, insecure=insecure, allow=allow)
    if tls_dir is None:
        return None
    from postcopy.link.tls import Credentials  # noqa: PLC0415 - not for --help, here and below

    return Credentials(tls_dir, allow)


def judge(address: Address, tls_dir: Path | None, *, insecure: bool, allow: Sequence[str] = ()) -> None:
    """Refuse what does not go together, before anybody looks at files; UsageError."""
    from postcopy.errors import UsageError  # noqa: PLC0415
    from postcopy.link.address import UnixAddress  # noqa: PLC0415

    if tls_dir is not None and insecure:
        raise UsageError("all is encrypted, or nothing is: --tls-dir or --insecure")
    if allow and tls_dir is None:
        raise UsageError("who somebody is, only a certificate says: it goes with --tls-dir")
    if tls_dir is None and not address.loopback and not insecure:
        raise UsageError(
            f"{address} is beyond this host, where plain TCP is neither secret nor safe: `postcopy certs tls "
            "HOST...` makes certificates and --tls-dir tls/HOST encrypts; in a network all your own add --insecure"
        )
    if tls_dir is not None and isinstance(address, UnixAddress):
        raise UsageError(f"{address}: a Unix socket has no TLS: the kernel says who is at its other end")


def credentials_of_migration(address: Address, own: Path | None, arguments: dict[str, Any]) -> Credentials | None:
    """Return what one migration is encrypted with: as `migrate` says, or else as the source's own command line does."""
    said = arguments.get("tls_dir")
    tls_dir = Path(said) if said is not None else None
    insecure = bool(arguments.get("insecure", False))
    from postcopy.link.address import UnixAddress  # noqa: PLC0415

    if tls_dir is None and not insecure and not isinstance(address, UnixAddress):
        tls_dir = own
    return credentials(address, tls_dir, insecure=insecure)
