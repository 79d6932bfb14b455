"""This host as agents describe it to each other: what its kernel grants, and what the connections need.

In: nothing. Out: the map that `doctor` prints and that travels in PROBED.
"""

from __future__ import annotations

import ctypes
import ssl
from typing import Any

from postcopy import __version__
from postcopy.kernel.host import describe_machine

LIBSSL = "libssl.so.3"


def describe_host() -> dict[str, Any]:
    """Try everything and read every setting; takes milliseconds, in a thread. Nothing stays behind."""
    return {"software": f"postcopy {__version__}", **describe_machine(), "openssl": _openssl()}


def _openssl() -> dict[str, Any]:
    """Say which OpenSSL Python itself was built with, and whether the library that the pumps need can be loaded."""
    try:
        ctypes.CDLL(LIBSSL)
    except OSError as refused:
        return {"python": ssl.OPENSSL_VERSION, "library": LIBSSL, "refusal": str(refused)}
    return {"python": ssl.OPENSSL_VERSION, "library": LIBSSL, "refusal": None}
