"""Certificates for tests: directories as --tls-dir wants them, right ones and wrong ones."""

from __future__ import annotations

import datetime
import threading

from agent.security.certificates import Authority, Validity, make_authority, make_host

GOOD = Validity.of_days(1)
_NOW = datetime.datetime.now(datetime.UTC)
EXPIRED = Validity(_NOW - datetime.timedelta(days=2), _NOW - datetime.timedelta(days=1))


_AUTHORITIES: dict[str, Authority] = {}
_MAKING = threading.Lock()


def authority(name: str = "right") -> Authority:
    """Return one authority for each name, for the length of the process, whichever threads ask at a time."""
    with _MAKING:
        if name not in _AUTHORITIES:
            _AUTHORITIES[name] = make_authority(GOOD, f"CA {name}")
        return _AUTHORITIES[name]


def directory(path, names=("localhost", "127.0.0.1", "::1"), *, signed_by="right", trusts=None, validity=GOOD):
    """Make a host's directory: whose certificate it is, by whom it is signed, which authority it believes."""
    make_host(path, authority(signed_by), tuple(names), validity)
    if trusts is not None:
        from cryptography.hazmat.primitives.serialization import Encoding

        (path / "ca-cert.pem").write_bytes(authority(trusts).certificate.public_bytes(Encoding.PEM))
    return path
