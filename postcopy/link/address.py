"""Addresses as people type them: `tcp:HOST:PORT`, `tcp:[::1]:PORT`, `unix:PATH`. Text enters, values leave."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from postcopy.errors import UsageError
from postcopy.limits import UNIX_PATH_BYTES_MAX


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host (name or number, IPv6 without its brackets) and a port, 0 to 65535."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether it is certain that nothing of it leaves this host."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket in the file system."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    @property
    def loopback(self) -> bool:
        """Nothing of a Unix socket leaves this host."""
        return True


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """Return the address that `text` names; UsageError, with how to write it, where it names none."""
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "tcp":
        return _parse_tcp(text, rest)
    if colon and scheme == "unix":
        if not rest or "\0" in rest:
            raise UsageError(f"address {text!r} names no file: write it unix:PATH")
        if len(rest.encode()) > UNIX_PATH_BYTES_MAX:
            raise UsageError(f"address {text!r}: a socket's path has at most {UNIX_PATH_BYTES_MAX} bytes")
        return UnixAddress(rest)
    raise UsageError(f"address {text!r} is not understood: write it tcp:HOST:PORT or unix:PATH")


def parse_host_port(text: str) -> TcpAddress:
    """Return the address that `HOST:PORT` names, with or without `tcp:` before it."""
    return _parse_tcp(text, text.removeprefix("tcp:"))


def _parse_tcp(text: str, rest: str) -> TcpAddress:
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        port = tail.removeprefix(":") if bracket and tail.startswith(":") else ""
        if ":" not in host:
            raise UsageError(f"address {text!r}: brackets hold an IPv6 address, as in tcp:[::1]:7000")
    else:
        host, _, port = rest.rpartition(":")
        if ":" in host:
            raise UsageError(f"address {text!r}: write an IPv6 address in brackets, as in tcp:[::1]:7000")
    if not host or not (port.isascii() and port.isdigit()):
        raise UsageError(f"address {text!r} is not understood: write it tcp:HOST:PORT")
    number = int(port) if len(port) <= 5 else 1 << 16
    if number > 65535:
        raise UsageError(f"address {text!r}: port {port} is beyond 65535")
    return TcpAddress(host, number)
