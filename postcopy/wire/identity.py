"""Whose migration a fetch is: the destination chooses its id, and everybody on the way reads it.

So the id is made of a secret, which only control says: whoever says an id and not its secret is somebody else. Nobody
has to remember anything for that, and an agent that was started anew knows it, too.
"""

from __future__ import annotations

import hashlib
import hmac

from postcopy.limits import MIGRATION_ID_BYTES, SECRET_BYTES


def id_of(token: bytes) -> bytes:
    """Return the id (16 bytes) of the migration of which `token` (32 bytes) is one: it begins with the secret."""
    return hashlib.sha256(token[:SECRET_BYTES]).digest()[:MIGRATION_ID_BYTES]


def belongs(migration_id: bytes, token: bytes) -> bool:
    """Whether whoever says this token may say this id."""
    return hmac.compare_digest(migration_id, id_of(token))


def renewed(token: bytes, fresh: bytes) -> bytes:
    """Return the token of another attempt of the same migration; `fresh` are random bytes, as many as of a token."""
    return token[:SECRET_BYTES] + fresh[SECRET_BYTES:]
