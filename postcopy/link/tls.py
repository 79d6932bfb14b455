"""TLS 1.3 on the control connection: certificates of both ends, one directory in the manner of QEMU's tls-creds-x509.

A directory and the names that are wanted enter; contexts leave, and with a connected socket a `Tunnel`: what came
enters it and plain text leaves, plain text enters it and what is to be sent leaves. It knows no socket and no event
loop, so it is the same on each of them, and an alert that says why a handshake failed is sent and not dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Collection
from pathlib import Path
from typing import Any

from postcopy.errors import LinkError, UsageError
from postcopy.limits import FAREWELL_BYTES, FAREWELL_SECONDS, HANDSHAKE_SECONDS
from postcopy.link.address import Address, TcpAddress
from postcopy.pump.tls import openssl
from postcopy.wire.version import TLS_SINCE

PIECE_BYTES = 16 << 10

# The CA's certificate, and its list of revoked ones where there is one.
_AUTHORITY = ("ca-cert.pem", "ca-crl.pem")

# OpenSSL's reasons for what people meet, in words. An alert was sent by the other end.
_WORDS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate",
    "UNSUPPORTED_PROTOCOL": "it speaks no TLS 1.3",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks no TLS 1.3",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate of this host",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not accept this host's certificate: another CA signed it",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept this host's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it does not accept this host's certificate, which has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "it does not accept this host's certificate, which was revoked",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it does not accept this host's certificate, which is for something else",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "it takes plain connections only: start it with --tls-dir",
    "WRONG_VERSION_NUMBER": "what it sends is no TLS",
}


class Credentials:
    """Who this host is, and whom it believes: a directory, and the names that may come in, or all where none is said.

    A renewed certificate counts from the next connection on. HostError where OpenSSL cannot be loaded.
    """

    def __init__(self, directory: Path, allowed: Collection[str] = ()) -> None:
        openssl()  # the pumps need it: better said now than when a guest is about to leave
        self.directory = directory
        self._allowed = frozenset(name.lower() for name in allowed)
        self._listening: tuple[object, ssl.SSLContext] | None = None

    def for_listening(self) -> ssl.SSLContext:
        """Return what the destination needs; UsageError names the file that is not as it must be.

        Whoever connects has this called, so it is made anew only where a file has changed.
        """
        stamp = [_stamp(self.directory / name) for name in (*_AUTHORITY, "server-cert.pem", "server-key.pem")]
        if self._listening is None or self._listening[0] != stamp:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.num_tickets = 0
            self._listening = (stamp, self._fill(context, "server"))
        return self._listening[1]

    def for_dialling(self) -> ssl.SSLContext:
        """Return what the source needs: it checks the name that was dialled."""
        return self._fill(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "client")

    def _fill(self, context: ssl.SSLContext, end: str) -> ssl.SSLContext:
        authority, revoked = (self.directory / name for name in _AUTHORITY)
        certificate, key = self.directory / f"{end}-cert.pem", self.directory / f"{end}-key.pem"
        for file in (authority, certificate, key):
            _check_readable(file)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(authority)
            if revoked.exists():
                _check_readable(revoked)
                context.load_verify_locations(revoked)
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        except ssl.SSLError as error:
            raise UsageError(f"{self.directory}: what is to be a CA's in ca-*.pem is none: {_reason(error)}") from error
        try:
            context.load_cert_chain(certificate, key, password=lambda: b"")  # asks nobody at the terminal
        except ssl.SSLError as error:
            text = f"{certificate} and {key.name} are no certificate and its key without a password"
            raise UsageError(f"{text}: {_reason(error)}") from error
        return context

    def admits(self, names: frozenset[str]) -> bool:
        """Whether somebody of these names is wanted."""
        return not self._allowed or not self._allowed.isdisjoint(names)


def _stamp(file: Path) -> object:
    """Return what changes with a file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _check_readable(file: Path) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        text = f"{file}: {error.strerror}"
        raise UsageError(f"{text}; `postcopy certs` makes a directory with all that TLS needs") from error


def versions_over(tls: Credentials | None, versions: tuple[int, int]) -> tuple[int, int]:
    """Return which of these versions of the protocol, lowest and highest, are spoken with TLS or without."""
    lowest, highest = versions
    return versions if tls is None else (max(lowest, TLS_SINCE), highest)


class Tunnel:
    """One TLS session of the end that listens (no `name`) or of the end that dials, and wants `name` there."""

    def __init__(self, context: ssl.SSLContext, name: str | None = None) -> None:
        self._came, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        listens = name is None
        self._session = context.wrap_bio(self._came, self._leaving, server_side=listens, server_hostname=name)
        self.ended = False

    def put(self, data: bytes) -> None:
        """Take in what came."""
        self._came.write(data)

    def leaving(self) -> bytes:
        """Return what is to be sent."""
        return self._leaving.read()

    def greet(self) -> bool:
        """Go on with the handshake; True once it is over, ssl.SSLError where it failed."""
        try:
            self._session.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def opened(self) -> bytes:
        """Return the plain text of what came so far; `ended` is set at the end of it; ssl.SSLError for a forgery."""
        pieces = []
        with contextlib.suppress(ssl.SSLWantReadError):
            while piece := self._session.read(PIECE_BYTES):
                pieces.append(piece)
            self.ended = True
        return b"".join(pieces)

    def sealed(self, data: bytes) -> bytes:
        """Return what is to be sent of this plain text."""
        self._session.write(data)
        return self._leaving.read()

    def farewell(self) -> bytes:
        """Return what says that nothing follows."""
        with contextlib.suppress(ssl.SSLError):
            self._session.unwrap()
        return self._leaving.read()

    def names(self) -> frozenset[str]:
        """Return the names of the other end's certificate: the alternative ones, or else the common name."""
        certificate: Any = self._session.getpeercert() or {}
        names = [value for _, value in certificate.get("subjectAltName", ())]
        if not names:
            subject = [pair for part in certificate.get("subject", ()) for pair in part]
            names = [value for key, value in subject if key == "commonName"]
        return frozenset(name.lower() for name in names)


async def greet(connection: Any, tunnel: Tunnel) -> None:
    """Hold a tunnel's handshake on a non-blocking socket; LinkError says what either end refused."""
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            while not await _step(connection, tunnel):
                data = await asyncio.get_running_loop().sock_recv(connection, PIECE_BYTES)
                if not data:
                    raise LinkError("it closed the connection in the middle of the handshake")
                tunnel.put(data)
    except TimeoutError:
        raise LinkError(f"no handshake within {HANDSHAKE_SECONDS:g} s") from None
    except ssl.SSLError as error:
        raise LinkError(words(error)) from error


async def _step(connection: Any, tunnel: Tunnel) -> bool:
    """Go on with the handshake, and send what it says in any case: it may be an alert."""
    try:
        return tunnel.greet()
    finally:
        if said := tunnel.leaving():
            await asyncio.get_running_loop().sock_sendall(connection, said)


def dialled_name(address: Address) -> str:
    """Return the name that the certificate of whoever answers at `address` must have."""
    if not isinstance(address, TcpAddress):
        raise UsageError(f"{address}: a Unix socket has no TLS")
    return address.host


def words(error: ssl.SSLError) -> str:
    """Say what a failure of TLS means, without OpenSSL's numbers and its file names."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message.rstrip('.')}"
    return _WORDS.get(error.reason or "", _reason(error))


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or error.strerror or str(error)).replace("_", " ").lower()


async def farewell(connection: Any, said: bytes = b"") -> None:
    """Say one last thing and wait, for a short while, until the other end has closed; the socket stays the caller's."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(FAREWELL_SECONDS):
            if said:
                await loop.sock_sendall(connection, said)
            connection.shutdown(1)  # SHUT_WR
            unread = FAREWELL_BYTES
            while unread > 0 and (data := await loop.sock_recv(connection, PIECE_BYTES)):
                unread -= len(data)
