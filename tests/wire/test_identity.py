"""The id of a fetch is made of a secret, and nothing else of its token counts for it."""

from __future__ import annotations

import pytest

from postcopy.limits import SECRET_BYTES
from postcopy.wire.identity import belongs, id_of, renewed

TOKEN = bytes(range(32))


def test_an_id_belongs_to_every_token_of_its_secret() -> None:
    assert id_of(TOKEN).hex() == "be45cb2605bf36bebde684841a28f0fd"  # of 00 01 … 0f
    again = renewed(TOKEN, b"\xff" * 32)
    assert (again[:SECRET_BYTES], again[SECRET_BYTES:]) == (TOKEN[:SECRET_BYTES], b"\xff" * 16)
    assert belongs(id_of(TOKEN), again)


@pytest.mark.parametrize("byte", range(SECRET_BYTES))
def test_an_id_belongs_to_no_other_secret(byte: int) -> None:
    other = bytearray(TOKEN)
    other[byte] ^= 1
    assert not belongs(id_of(TOKEN), bytes(other))
