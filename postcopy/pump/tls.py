"""TLS 1.3 on a data connection: the owner of a session in C until a pump takes it over with the connection.

A connected, non-blocking socket, a key and its name enter; the session is handed to `attach` of a pump once its
handshake is over. Nothing here waits: `handshake` says what for.
"""

from __future__ import annotations

import errno
import functools
import os
from typing import Any, Literal, Self

from postcopy.errors import HostError, LinkError
from postcopy.pump._pump import ffi, lib

KEY_BYTES: int = lib.TLS_KEY_BYTES

Step = Literal["done", "read", "write"]
_STEPS: dict[int, Step] = {lib.TLS_DONE: "done", lib.TLS_WANTS_READ: "read", lib.TLS_WANTS_WRITE: "write"}

_REASON_BYTES = 256


@functools.cache
def openssl() -> Any:
    """Load OpenSSL, once and for good; HostError says why it cannot be."""
    reason = ffi.new("char[]", _REASON_BYTES)
    loaded = lib.tls_load(reason, _REASON_BYTES)
    if loaded == ffi.NULL:
        said = ffi.string(reason).decode(errors="replace")
        raise HostError(f"TLS needs OpenSSL 3, which cannot be loaded ({said}): install it (Debian: libssl3)")
    return loaded


class TlsSession:
    """One end of a session on a socket, which stays the caller's and must outlive it."""

    def __init__(self, socket_fd: int, *, listens: bool, identity: str, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes")
        end = lib.TLS_LISTENS if listens else lib.TLS_DIALS
        self._tls: Any = lib.tls_create(openssl(), socket_fd, end, identity.encode(), key)
        if self._tls == ffi.NULL:
            raise HostError(f"a TLS session could not be made: {os.strerror(ffi.errno)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def handshake(self) -> Step:
        """Go on with the handshake and say what it waits for, or that it is done; LinkError where it failed."""
        step = lib.tls_handshake(self._handle)
        if step == lib.TLS_FAILED:
            raise LinkError(f"no TLS: {ffi.string(lib.tls_reason(self._handle)).decode()}")
        return _STEPS[step]

    def send(self, data: bytes) -> None:
        """Send a few bytes, for which a fresh connection has room."""
        if lib.tls_put(self._handle, data, len(data)) != len(data):
            raise OSError(ffi.errno, os.strerror(ffi.errno))

    def receive(self, size: int) -> bytes | None:
        """Return what came, b"" at the end, None where more has to be waited for."""
        buffer = ffi.new("uint8_t[]", size)
        got = lib.tls_take(self._handle, buffer, size)
        if got < 0 and ffi.errno == errno.EAGAIN:
            return None
        if got < 0:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        return bytes(ffi.buffer(buffer, got))

    def release(self) -> Any:
        """Give the session up: whoever gets it frees it."""
        tls, self._tls = self._handle, ffi.NULL
        return tls

    def close(self) -> None:
        """Forget the key and free the session, unless it was released."""
        tls, self._tls = self._tls, ffi.NULL
        lib.tls_destroy(tls)

    @property
    def _handle(self) -> Any:
        """The session in C; RuntimeError once it is closed: C would follow the pointer wherever it leads."""
        if self._tls == ffi.NULL:
            raise RuntimeError("the TLS session is closed")
        return self._tls


def released(session: TlsSession | None) -> Any:
    """Return what `attach` in C takes for a session, or for none."""
    return ffi.NULL if session is None else session.release()
