"""Directories of certificates that are not as they must be, and one that changes while somebody listens with it."""

import pytest

from postcopy.errors import LinkError, UsageError
from postcopy.link.dial import dial_control
from postcopy.link.tls import Credentials
from tests.certificates import directory

from .test_tls import Listening


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_a_file_that_is_missing(play, right, name):
    (right / name).unlink()
    with pytest.raises(UsageError, match=rf"{name}: No such file or directory; `postcopy certs` makes"):
        Credentials(right).for_listening()


def test_files_that_do_not_belong_together(right, tmp_path):
    (right / "client-key.pem").write_bytes((right / "server-key.pem").read_bytes())
    with pytest.raises(UsageError, match="no certificate and its key without a password: key values mismatch"):
        Credentials(right).for_dialling()
    (right / "ca-cert.pem").write_text("nothing")
    with pytest.raises(UsageError, match=r"what is to be a CA's in ca-\*.pem is none"):
        Credentials(right).for_listening()


def test_a_renewed_certificate_counts_from_the_next_connection_on(play, right, tmp_path):
    async def story():
        tls = Credentials(right)
        async with Listening(tls) as there:
            (await dial_control(there.address, tls)).abort()
            (await there.came.get()).abort()
            assert tls.for_listening() is tls.for_listening()
            other = directory(tmp_path / "other", ["b.example"])
            for part in ("key", "cert"):
                (other / f"server-{part}.pem").rename(right / f"server-{part}.pem")
            with pytest.raises(LinkError, match="IP address mismatch"):
                await dial_control(there.address, tls)

    play(story)
