"""TLS on a data connection: who has the key comes in, nobody else does, and nothing that travels can be changed."""

import contextlib
import ctypes
import errno
import os
import socket
import subprocess

import pytest

from postcopy.errors import HostError, LinkError
from postcopy.pump import tls
from postcopy.pump._pump import lib
from postcopy.pump.tls import TlsSession

KEY, NAME = bytes(range(32)), "postcopy push 00112233445566778899aabbccddeeff"


class Wire:
    """Two sessions, and whoever carries the bytes between them."""

    def __init__(self, dials=(NAME, KEY), listens=(NAME, KEY)):
        self.ends, self.between, self.sessions = [], [], []
        for listening, (name, key) in enumerate((dials, listens)):
            end, other = socket.socketpair()
            for one in (end, other):
                one.setblocking(False)
            self.ends.append(end)
            self.between.append(other)
            self.sessions.append(TlsSession(end.fileno(), listens=bool(listening), identity=name, key=key))
        self.near, self.far = self.sessions
        self.carried = [0, 0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for session in self.sessions:
            session.close()
        for one in (*self.ends, *self.between):
            one.close()

    def carry(self, change=lambda data: data):
        """Bring all that was sent to the other side; return how much it was."""
        total = 0
        for side in (0, 1):
            while True:
                try:
                    data = self.between[side].recv(1 << 20)
                except BlockingIOError:
                    break
                if not data:
                    break
                self.between[1 - side].send(change(data))
                self.carried[side] += len(data)
                total += len(data)
        return total

    def shake_hands(self):
        steps = ["", ""]
        while steps != ["done", "done"]:
            for side in (0, 1):
                if steps[side] != "done":
                    steps[side] = self.sessions[side].handshake()
            if not self.carry() and steps != ["done", "done"]:
                raise AssertionError(steps)
        return self


def test_what_is_sent_arrives_and_nobody_between_reads_it():
    with Wire().shake_hands() as wire:
        seen = []
        assert wire.far.receive(100) is None
        wire.near.send(b"the content of a page")
        wire.carry(lambda data: seen.append(data) or data)
        assert wire.far.receive(100) == b"the content of a page"
        assert b"content" not in b"".join(seen)
        wire.far.send(b"\x06")
        wire.carry()
        assert wire.near.receive(1) == b"\x06"


def test_neither_end_sends_a_ticket():
    with Wire().shake_hands() as wire:
        assert wire.carry() == 0


@pytest.mark.parametrize(
    ("listens", "told"),
    [
        ((NAME, b"x" * 32), "binder does not verify"),
        (("postcopy urgent 00112233445566778899aabbccddeeff", KEY), "no suitable signature algorithm|no shared cipher"),
        (("postcopy push ff112233445566778899aabbccddeeff", KEY), "no suitable signature algorithm|no shared cipher"),
    ],
    ids=["key", "role", "migration"],
)
def test_who_has_not_the_key_of_this_very_connection_is_refused(listens, told):
    with Wire(listens=listens) as wire:
        with pytest.raises(LinkError, match=f"no TLS: ({told})"):
            wire.shake_hands()
        wire.carry()
        with pytest.raises(LinkError, match=r"no TLS: .*alert"):  # and is told so
            wire.near.handshake()


@pytest.mark.parametrize("where", [0, 5, 20, -1])
def test_a_byte_that_was_changed_ends_the_connection(where):
    def change(data):
        changed = bytearray(data)
        changed[where] ^= 0x40
        return bytes(changed)

    with Wire().shake_hands() as wire:
        wire.near.send(b"the content of a page")
        wire.carry(change)
        with pytest.raises(OSError, match="Bad message") as failure:
            wire.far.receive(100)
        assert failure.value.errno == errno.EBADMSG


def test_a_record_that_comes_twice_is_not_taken_twice():
    with Wire().shake_hands() as wire:
        wire.near.send(b"once")
        wire.carry(lambda data: data + data)
        assert wire.far.receive(100) == b"once"
        with pytest.raises(OSError, match="Bad message"):
            wire.far.receive(100)


def test_the_end_of_the_connection_is_an_end():
    with Wire().shake_hands() as wire:
        wire.near.send(b"last")
        wire.carry()
        wire.between[1].close()
        assert wire.far.receive(100) == b"last"
        assert wire.far.receive(100) == b""


def test_the_key_is_changed_in_time():
    with Wire().shake_hands() as wire:
        before = wire.carried[0]
        lib.tls_change_key_after(wire.near._handle, 4)
        for number in range(10):
            wire.near.send(b"%010d" % number)
            wire.carry()
            assert wire.far.receive(10) == b"%010d" % number
        # A record of 10 bytes is 32 on the wire; a KeyUpdate is 27, and goes before the fifth and the ninth.
        assert wire.carried[0] - before == 10 * 32 + 2 * 27


def test_a_full_socket_loses_nothing():
    """Sent until there is no room, in pieces that are no records, and received in others."""
    with Wire().shake_hands() as wire:
        content = os.urandom(3 << 20)
        sent = got = 0
        received = []
        while got < len(content):
            piece = content[sent : sent + 100_000]
            moved = lib.tls_put(wire.near._handle, piece, len(piece)) if piece else 0
            sent += max(0, moved)
            data = b""
            with contextlib.suppress(BlockingIOError):
                data = wire.between[0].recv(65536)
            while data:
                with contextlib.suppress(BlockingIOError):
                    data = data[wire.between[1].send(data) :]
                if (some := wire.far.receive(30_000)) is not None:
                    received.append(some)
                    got += len(some)
            while (some := wire.far.receive(30_000)) is not None:
                received.append(some)
                got += len(some)
        assert b"".join(received) == content


def test_openssls_own_client_with_the_key(tmp_path):
    """A third implementation of this end, as the protocol's specification describes it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3", "-quiet", "-no_ign_eof"]
        command += ["-ciphersuites", "TLS_AES_128_GCM_SHA256", "-psk_identity", NAME, "-psk", KEY.hex()]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
            connection, _ = listening.accept()
            with connection, TlsSession(connection.fileno(), listens=True, identity=NAME, key=KEY) as session:
                assert session.handshake() == "done"  # the socket blocks here
                client.stdin.write(b"hello\n")
                client.stdin.flush()
                assert session.receive(6) == b"hello\n"
                session.send(b"a page")
            out, _ = client.communicate(timeout=10)
            assert out == b"a page"


def test_a_host_without_the_library_says_so(monkeypatch):
    tls.openssl.cache_clear()

    class Nothing:
        def __getattr__(self, name):
            return getattr(lib, name)

        def tls_load(self, reason, size):
            text = b"libssl.so.3: cannot open shared object file: No such file or directory\0"
            tls.ffi.buffer(reason)[: len(text)] = text
            return tls.ffi.NULL

    monkeypatch.setattr(tls, "lib", Nothing())
    with pytest.raises(HostError, match=r"TLS needs OpenSSL 3, .*\(libssl.so.3: cannot open .*Debian"):
        tls.openssl()
    tls.openssl.cache_clear()


def test_what_was_closed_or_given_away_is_not_used():
    with Wire() as wire:
        wire.near.close()
        with pytest.raises(RuntimeError, match="the TLS session is closed"):
            wire.near.handshake()
        with pytest.raises(ValueError, match="a key has 32 bytes"):
            TlsSession(wire.ends[0].fileno(), listens=False, identity=NAME, key=b"short")


def leave_an_error_behind():
    """As another session of this thread does whose certificate was refused, say."""
    crypto = ctypes.CDLL("libcrypto.so.3")
    crypto.ERR_new()
    crypto.ERR_set_error(20, 1, None)
    assert crypto.ERR_peek_error()


def test_what_another_session_left_behind_is_not_taken_for_ones_own_failure():
    with Wire() as wire:
        wire.shake_hands()
        leave_an_error_behind()
        assert wire.near.receive(10) is None
        wire.carry()
        leave_an_error_behind()
        wire.near.send(b"x" * 100)
        wire.carry()
        assert wire.far.receive(100) == b"x" * 100


def test_a_failure_that_was_found_behind_good_bytes_is_told_by_the_next_call():
    with Wire() as wire:
        wire.shake_hands()
        wire.near.send(b"x" * 100)
        wire.carry()
        wire.near.send(b"y" * 100)
        wire.carry(lambda data: data[:-1] + bytes([data[-1] ^ 1]))
        assert wire.far.receive(200) == b"x" * 100
        for _ in range(2):
            leave_an_error_behind()
            with pytest.raises(OSError, match="Bad message"):
                wire.far.receive(200)
