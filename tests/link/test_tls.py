"""TLS on the control connection: who comes in and who does not, what each is told, on both event loops."""

import asyncio
import logging
import socket
import ssl

import pytest

from postcopy.errors import LinkError, ProtocolError, UsageError
from postcopy.link.address import TcpAddress, UnixAddress
from postcopy.link.control import ControlChannel
from postcopy.link.dial import dial_control
from postcopy.link.listen import Listener
from postcopy.link.tls import Credentials, Tunnel
from postcopy.wire.control import Hello, Ready, Refuse, Run, State, encode
from postcopy.wire.preamble import NO_TLS, Preamble, Role, Security, pack
from tests.certificates import EXPIRED, directory

from .test_listen import no_data

HELLO = Hello((3, 3), "near")
CONTROL = pack(Preamble(Role.CONTROL, 3, security=Security.TLS))


class Listening:
    """A listener on loopback, and the channels that came in."""

    def __init__(self, tls, host="127.0.0.1"):
        self.came = asyncio.Queue()
        self.listener = Listener(TcpAddress(host, 0), self._take, no_data, tls)

    async def _take(self, channel):
        await self.came.put(channel)

    async def __aenter__(self):
        await self.listener.open()
        return self

    async def __aexit__(self, *_):
        await self.listener.close()

    @property
    def address(self):
        return self.listener.address

    async def settled(self):
        """Wait until nobody is being judged any more: every line is written then."""
        while self.listener._unproven:
            await asyncio.sleep(0.001)


async def conversation(near):
    """What the one that dialled hears in answer to its first message."""
    near.send(HELLO)
    try:
        return await near.receive()
    finally:
        near.abort()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_control_connection_from_end_to_end(play, right, host):
    async def story():
        tls = Credentials(right)
        async with Listening(tls, host) as there:
            near = await dial_control(TcpAddress(host, there.address.port), tls)
            far = await there.came.get()
            assert near.encrypted
            assert far.encrypted
            near.send(HELLO)
            near.send(Ready())
            assert await far.receive() == HELLO
            assert await far.receive() == Ready()
            state = State(b"\x5a" * (3 << 20), 0.0, "boot")  # many records, more than any buffer
            far.send(Ready())
            far.send(state)
            assert [await near.receive(), await near.receive()] == [Ready(), state]
            far.send(Run())
            await far.close()
            assert await near.receive() == Run()
            with pytest.raises(LinkError, match="closed the connection"):
                await near.receive()
            with pytest.raises(LinkError, match="is closed"):
                near.send(Run())
            await near.close()

    play(story)


def test_what_travels_is_not_what_is_said(play, right):
    """Both ends of a tunnel, and all that passes between them: neither names nor content, and no session ticket."""

    def through(one, other, finished):
        passed = b""
        while not (finished[0] and finished[1]):
            for index, (from_, to) in enumerate(((one, other), (other, one))):
                finished[index] = finished[index] or from_.greet()
                said = from_.leaving()
                passed += said
                if said:
                    to.put(said)
        return passed

    tls = Credentials(right)
    near, far = Tunnel(tls.for_dialling(), "localhost"), Tunnel(tls.for_listening())
    passed = through(near, far, [False, False])
    assert far.leaving() == b""  # a ticket would come behind the handshake
    assert b"right" not in passed  # the certificate's issuer: certificates are encrypted
    sealed = near.sealed(b"a page's content")
    assert b"content" not in sealed
    far.put(sealed)
    assert far.opened() == b"a page's content"
    assert "localhost" in far.names()
    forged = bytearray(near.sealed(b"another"))
    forged[-1] ^= 1
    far.put(bytes(forged))
    with pytest.raises(ssl.SSLError):
        far.opened()


def refused(play, caplog, make_near, listens, address=None):
    """Dial with credentials that are wrong somehow; return what the near end is told and the far end's only line."""

    async def story():
        async with Listening(listens) as there:
            where = address(there.address) if address else there.address
            with pytest.raises(LinkError) as told:
                await conversation(await dial_control(where, make_near()))
            await there.settled()
            assert there.came.empty()
            return str(told.value)

    with caplog.at_level(logging.WARNING):
        told = play(story)
    lines = [line.partition(": ")[2] for line in caplog.messages]
    return told.partition(": ")[2], lines


def test_another_authority(play, caplog, right, tmp_path):
    other = directory(tmp_path / "other", signed_by="wrong", trusts="right")
    told, (line,) = refused(play, caplog, lambda: Credentials(other), Credentials(right))
    assert told == "it does not accept this host's certificate: another CA signed it"
    assert "its certificate is not accepted: " in line


def test_an_authority_that_the_source_does_not_know(play, caplog, right, tmp_path):
    other = directory(tmp_path / "other", trusts="wrong")
    told, (line,) = refused(play, caplog, lambda: Credentials(other), Credentials(right))
    assert told.startswith("its certificate is not accepted: ")
    assert "it does not accept this host's certificate: another CA signed it" in line


def test_a_source_whose_certificate_has_expired(play, caplog, right, tmp_path):
    old = directory(tmp_path / "old", validity=EXPIRED)
    told, (line,) = refused(play, caplog, lambda: Credentials(old), Credentials(right))
    assert told == "it does not accept this host's certificate, which has expired"
    assert "its certificate is not accepted: certificate has expired" in line


def test_a_destination_whose_certificate_has_expired(play, caplog, right, tmp_path):
    old = directory(tmp_path / "old", validity=EXPIRED)
    told, (line,) = refused(play, caplog, lambda: Credentials(right), Credentials(old))
    assert told == "its certificate is not accepted: certificate has expired"
    assert "it does not accept this host's certificate, which has expired" in line


def test_a_destination_of_another_name(play, caplog, right, tmp_path):
    other = directory(tmp_path / "other", ["b.example"])
    told, (line,) = refused(play, caplog, lambda: Credentials(right), Credentials(other))
    assert "IP address mismatch, certificate is not valid for '127.0.0.1'" in told
    assert "it does not accept this host's certificate" in line
    caplog.clear()
    told, _ = refused(
        play, caplog, lambda: Credentials(right), Credentials(other), lambda where: TcpAddress("localhost", where.port)
    )
    assert "Hostname mismatch, certificate is not valid for 'localhost'" in told


def test_a_server_certificate_is_none_to_dial_with(play, caplog, right, tmp_path):
    odd = directory(tmp_path / "odd")
    for part in ("cert", "key"):
        (odd / f"client-{part}.pem").write_bytes((odd / f"server-{part}.pem").read_bytes())
    told, (line,) = refused(play, caplog, lambda: Credentials(odd), Credentials(right))
    assert "it does not accept this host's certificate" in told
    assert "its certificate is not accepted: unsuitable certificate purpose" in line


def test_a_revoked_certificate(play, caplog, right, tmp_path):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    from tests.certificates import GOOD, authority

    other = directory(tmp_path / "other")
    serial = x509.load_pem_x509_certificate((other / "client-cert.pem").read_bytes()).serial_number
    revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(GOOD.begin).build()
    listed = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority("right").certificate.subject)
        .last_update(GOOD.begin)
        .next_update(GOOD.end)
        .add_revoked_certificate(revoked)
        .sign(authority("right").key, hashes.SHA256())
    )
    (right / "ca-crl.pem").write_bytes(listed.public_bytes(Encoding.PEM))
    told, (line,) = refused(play, caplog, lambda: Credentials(other), Credentials(right))
    assert told == "it does not accept this host's certificate, which was revoked"
    assert "its certificate is not accepted: certificate revoked" in line


class Naked(Credentials):
    """A source that has no certificate, or speaks what nobody should any more."""

    def __init__(self, directory, version=None):
        super().__init__(directory)
        self._version = version

    def for_dialling(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.directory / "ca-cert.pem")
        if self._version is not None:
            context.load_cert_chain(self.directory / "client-cert.pem", self.directory / "client-key.pem")
            context.maximum_version = self._version
        return context


def test_no_certificate(play, caplog, right):
    told, (line,) = refused(play, caplog, lambda: Naked(right), Credentials(right))
    assert told == "it wants a certificate of this host"
    assert line.endswith("it showed no certificate")


def test_tls_1_2(play, caplog, right):
    told, (line,) = refused(play, caplog, lambda: Naked(right, ssl.TLSVersion.TLSv1_2), Credentials(right))
    assert (told, line) == ("it speaks no TLS 1.3", "no TLS: it speaks no TLS 1.3")


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["a.example"], ["other.example", "10.0.0.1"], ["A.Example"]])
def test_a_source_whose_name_is_wanted(play, right, tmp_path, names):
    near = directory(tmp_path / "a.example", ["a.example", "10.0.0.1"])

    async def story():
        async with Listening(Credentials(right, names)) as there:
            channel = await dial_control(there.address, Credentials(near))
            far = await there.came.get()
            far.send(Ready())
            assert await conversation(channel) == Ready()
            far.abort()

    play(story)


def test_a_source_whose_name_is_not_wanted(play, caplog, right, tmp_path):
    near = directory(tmp_path / "a.example", ["a.example", "10.0.0.1"])

    async def story():
        async with Listening(Credentials(right, ["b.example", "*.example"])) as there:
            answer = await conversation(await dial_control(there.address, Credentials(near)))
            assert isinstance(answer, Refuse)
            assert answer.code == "host"
            assert "takes no guest from 10.0.0.1, a.example" in answer.text
            await there.settled()
            assert there.came.empty()

    with caplog.at_level(logging.WARNING):
        play(story)
    (line,) = caplog.messages
    assert line.endswith("the certificate's name is not one that may come in: 10.0.0.1, a.example")


# --- plain against TLS ----------------------------------------------------------------------------------------------


def test_a_plain_source_and_a_destination_with_tls(play, caplog, right):
    async def story():
        async with Listening(Credentials(right)) as there:
            answer = await conversation(await dial_control(there.address))
            assert answer == Refuse("host", "this destination takes TLS only: the source needs --tls-dir")
            await there.settled()
            assert there.came.empty()

    with caplog.at_level(logging.WARNING):
        play(story)
    assert caplog.messages[0].endswith("it wants no TLS, and this agent takes nothing else")


def test_a_source_with_tls_and_a_plain_destination(play, caplog, right):
    told, (line,) = refused(play, caplog, lambda: Credentials(right), None)
    assert told == "it takes plain connections only: start it with --tls-dir"
    assert line == "it wants TLS, and this agent takes plain connections only"


def test_the_answer_in_plain_is_what_the_specification_says(play):
    async def story():
        async with Listening(None) as there:
            reader, writer = await asyncio.open_connection(there.address.host, there.address.port)
            writer.write(CONTROL + b"\x16\x03\x01\x00\x05hello")
            assert await reader.read() == NO_TLS
            writer.close()

    play(story)


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_data_connection_of_the_other_kind_is_closed_without_an_answer(play, right, encrypted):
    async def story():
        async with Listening(None if encrypted else Credentials(right)) as there:
            reader, writer = await asyncio.open_connection(there.address.host, there.address.port)
            token = bytes(32) if encrypted else b"t" * 32
            security = Security.TLS if encrypted else Security.PLAIN
            writer.write(pack(Preamble(Role.PUSH, 3, b"i" * 16, token, security)))
            assert await reader.read() == (NO_TLS if encrypted else b"")
            writer.close()

    play(story)


def test_a_unix_socket_has_none(play, right, tmp_path):
    async def story():
        with pytest.raises(UsageError, match="a Unix socket has no TLS"):
            await dial_control(UnixAddress(str(tmp_path / "s")), Credentials(right))

    play(story)


def test_a_message_that_is_none_inside_of_tls(play, right):
    async def story():
        tls = Credentials(right)
        async with Listening(tls) as there:
            near = await dial_control(there.address, tls)
            far = await there.came.get()
            near._writer.write(near._tunnel.sealed(encode(Ready())[:-1]))
            await near.close()
            with pytest.raises(ProtocolError, match="ended inside a control message"):
                await far.receive()
            far.abort()

    play(story)


def test_what_cannot_be_encrypted_any_more_is_known_not_to_be_sent(play, right):
    """A session that met a forgery is over in both directions, and whoever sends is told so in words of the link."""

    async def story():
        tls = Credentials(right)
        async with Listening(tls) as there:
            near = await dial_control(there.address, tls)
            far = await there.came.get()
            far._writer.write(b"\x17\x03\x03\x00\x20" + bytes(32))
            with pytest.raises(LinkError, match="TLS with tcp:"):
                await near.receive()
            assert not near._writer.is_closing()
            with pytest.raises(LinkError, match="TLS with tcp:"):
                near.send(Run())
            near._broken = ""  # and OpenSSL itself would not have it either
            with pytest.raises(LinkError, match=r"TLS with tcp:|is closed"):
                near.send(Run())
            near.abort()
            far.abort()

    play(story)


def test_bytes_that_are_no_records(play, right):
    async def story():
        near, far = socket.socketpair()
        tls = Credentials(right)
        channel = await ControlChannel.over(near, "far", Tunnel(tls.for_dialling(), "localhost"))
        far.sendall(b"no record, not even of an old TLS")
        with pytest.raises(LinkError, match="TLS with far: what it sends is no TLS"):
            await channel.receive()
        channel.abort()
        far.close()

    play(story)
