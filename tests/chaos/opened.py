"""The TLS of a control connection, ended in the middle and begun anew: who has certificates of both ends may look in.

Bytes of either end enter; what it said leaves in plain, and the same sealed for the other end. Data connections are not
opened: their key travels in here.
"""

from __future__ import annotations

import contextlib
import ssl


class Opened:
    """Both halves of one connection: `near` is towards the source, `far` towards the destination."""

    def __init__(self, credentials, host):
        self._near, self._far = _Half(credentials.for_listening()), _Half(credentials.for_dialling(), host)

    def begin(self):
        """Return the first bytes for the destination, which it waits for."""
        return self._far.greet()

    def hear(self, data, *, forward):
        """Take bytes of one end; return what it said, and bytes for itself."""
        return (self._near if forward else self._far).hear(data)

    def can_seal(self, *, forward):
        """Whether the other end is ready to be told anything."""
        return (self._far if forward else self._near).ready

    def seal(self, said, *, forward):
        """Return bytes for the other end that say the same."""
        return (self._far if forward else self._near).say(said)


class _Half:
    def __init__(self, context, host=None):
        self.ready = False
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=host is None, server_hostname=host)

    def greet(self):
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
            self.ready = True
        return self._out.read()

    def hear(self, data):
        self._in.write(data)
        said, answer = b"", b"" if self.ready else self.greet()
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while self.ready and (part := self._tls.read(65536)):
                said += part
        return said, answer + self._out.read()

    def say(self, said):
        self._tls.write(said)
        return self._out.read()
