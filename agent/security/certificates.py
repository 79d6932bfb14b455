"""A certificate authority of one's own and certificates for its hosts, for trying out and for closed networks.

Names of hosts enter; folders leave, one for each host, laid out as QEMU's tls-creds-x509 wants them (ca-cert.pem,
server-cert.pem, server-key.pem, client-cert.pem, client-key.pem). Nothing that is there already is written over.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from postcopy.errors import UsageError

AUTHORITY_NAME = "postcopy trial CA"
AUTHORITY_KEY = "ca-key.pem"
AUTHORITY_CERT = "ca-cert.pem"
PURPOSES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}

# A certificate is used at once, on hosts whose clocks are not quite the same.
CLOCKS_APART = datetime.timedelta(hours=1)

# What a DNS name may be made of, and no more than X.509 lets a common name have.
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9_])?")


@dataclass(frozen=True)
class Validity:
    """From when until when a certificate is good."""

    begin: datetime.datetime
    end: datetime.datetime

    @classmethod
    def of_days(cls, days: int) -> Validity:
        """Begin now."""
        now = datetime.datetime.now(datetime.UTC)
        return cls(now - CLOCKS_APART, now + datetime.timedelta(days=days))


@dataclass(frozen=True)
class Authority:
    """A certificate authority with its key."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def parse_host(text: str) -> tuple[str, ...]:
    """Return the names and addresses of one host, from "NAME,ADDRESS,..."; UsageError for what is neither."""
    names = tuple(text.split(","))
    for name in names:
        if _address(name) is None and not _NAME.fullmatch(name):
            raise UsageError(f"host {text!r}: {name!r} is neither a name nor an address: write NAME or NAME,ADDRESS")
    return names


def authority_in(folder: Path, days: int) -> Authority:
    """Return the authority that `folder` holds, made now where there is none."""
    key_file, cert_file = folder / AUTHORITY_KEY, folder / AUTHORITY_CERT
    if not key_file.exists() and not cert_file.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = make_authority(Validity.of_days(days))
        write(key_file, _pem_of(authority.key), secret=True)
        write(cert_file, authority.certificate.public_bytes(serialization.Encoding.PEM))
        return authority
    try:
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate(cert_file.read_bytes())
    except (ValueError, TypeError) as error:
        raise UsageError(f"{folder}: its {AUTHORITY_KEY} and {AUTHORITY_CERT} are no authority: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise UsageError(f"{folder}: {AUTHORITY_KEY} is not the key of {AUTHORITY_CERT}")
    return Authority(key, certificate)


def make_authority(validity: Validity, name: str = AUTHORITY_NAME) -> Authority:
    """Make an authority; nothing of it is written."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _begin(subject, subject, key.public_key(), validity)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    return Authority(key, builder.sign(key, hashes.SHA256()))


def make_trial(folder: Path, name: str) -> Path:
    """Make the folder of a host that migrates to itself for a day; what signed it is forgotten at once."""
    validity = Validity.of_days(1)
    make_host(folder, make_authority(validity), (name,), validity)
    return folder


def make_host(folder: Path, authority: Authority, names: tuple[str, ...], validity: Validity) -> None:
    """Make the folder of one host: a certificate to be dialled under `names`, and one to dial with as the first."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise UsageError(f"{folder} is there already: remove it, or name another host") from None
    write(folder / AUTHORITY_CERT, authority.certificate.public_bytes(serialization.Encoding.PEM))
    for purpose in PURPOSES:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = make_certificate(authority, key.public_key(), names, purpose, validity)
        write(folder / f"{purpose}-key.pem", _pem_of(key), secret=True)
        write(folder / f"{purpose}-cert.pem", certificate.public_bytes(serialization.Encoding.PEM))


def make_certificate(
    authority: Authority, key: ec.EllipticCurvePublicKey, names: tuple[str, ...], purpose: str, validity: Validity
) -> x509.Certificate:
    """Sign a certificate of `names` for one purpose, "server" or "client"."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    others: list[x509.GeneralName] = []
    for name in names:
        address = _address(name)
        others.append(x509.DNSName(name) if address is None else x509.IPAddress(address))
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = _begin(subject, authority.certificate.subject, key, validity)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([PURPOSES[purpose]]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(others), critical=False)
    builder = builder.add_extension(issuer, critical=False)
    return builder.sign(authority.key, hashes.SHA256())


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, validity: Validity
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity.begin)
        .not_valid_after(validity.end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    """Say what a key is for: to sign certificates and lists of revoked ones, or to prove who one is."""
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Make a file; what is secret nobody else may read, from its first moment on."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    except FileExistsError:
        raise UsageError(f"{path} is there already, and nothing is written over") from None
    with open(descriptor, "wb") as file:  # noqa: PTH123 - a path would lose the mode
        file.write(data)
