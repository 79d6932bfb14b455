"""Somebody who may fetch, too, and says he is another: nothing that he says is taken for that other's."""

from __future__ import annotations

import secrets

import pytest

from postcopy.limits import TOKEN_BYTES
from postcopy.link.tls import Credentials
from postcopy.pump.tls import TlsSession
from postcopy.wire.control import Hello, LayoutOffer, Loaded, Ready, Refuse, Run, State, Welcome
from postcopy.wire.messages import ASKED_FOR, GONE, Piece
from postcopy.wire.preamble import Preamble, Role, Security, pack, psk_identity, unpack
from postcopy.wire.version import VERSION
from tests.agent.fakes import Channel, connect
from tests.certificates import directory
from tests.chaos.proxy import Proxy, upstream_of
from tests.outside.test_ends import placed
from tests.outside.test_recovery import reconnects
from tests.outside.vmm import MIB, PAGE, Vmm, destination, snapshot, source

FROM = ("127.0.0.1",)


class Impostor:
    """A destination that dials for itself, with another one's id; what was said to its WELCOME is in `answer`."""

    def __init__(self, address, migration_id, tls):
        self.address, self.migration_id, self.tls = address, migration_id, tls
        self.security = Security.PLAIN if tls is None else Security.TLS
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.data = []
        connection = connect(address)
        connection.sendall(pack(Preamble(Role.FETCH, VERSION, security=self.security)))
        if tls is not None:
            connection = Credentials(tls).for_dialling().wrap_socket(connection, server_hostname="127.0.0.1")
        self.channel = Channel(connection)
        self.channel.expect(Hello)
        pieces = (Piece(0, PAGE, PAGE),)
        self.channel.send(Welcome(VERSION, migration_id, self.token, "an impostor", pieces, ASKED_FOR))
        self.answer = self.channel.receive()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in self.data:
            one.close()
        self.channel.close()

    def run(self):
        """Go on up to RUN."""
        for role in (Role.URGENT, Role.PUSH):
            connection = connect(self.address)
            connection.setblocking(True)
            if self.tls is None:
                connection.sendall(pack(Preamble(role, VERSION, self.migration_id, self.token)))
                connection.recv(1)
            else:
                connection.sendall(pack(Preamble(role, VERSION, self.migration_id, security=self.security)))
                name = psk_identity(role, self.migration_id)
                session = TlsSession(connection.fileno(), listens=False, identity=name, key=self.token)
                session.handshake()
                session.receive(1)
                self.data.append(session)
            self.data.append(connection)
        self.channel.send(Ready())
        self.channel.expect(State)
        self.channel.send(Loaded())
        self.channel.expect(Run)


@pytest.fixture(params=["plain", "tls"])
def hosts(request, tmp_path):
    """Return the directories of certificates of three hosts, of one authority; or none."""
    if request.param == "plain":
        return None, None, None
    names = ("source.test", "victim.test", "impostor.test")
    return tuple(directory(tmp_path / name, (name, *FROM)) for name in names)


def with_tls(host):
    return () if host is None else ("--tls-dir", host)


def seen_in(proxy):
    """Return the id that a fetch's data connections show to everybody on the way."""
    shown = [unpack(link.preamble) for link in proxy.links if link.role in {Role.URGENT, Role.PUSH}]
    (migration_id,) = {one.migration_id for one in shown}
    return migration_id


@pytest.mark.parametrize("then", ["says lost", "stays", "comes first"])
def test_who_says_the_id_of_another_is_refused_and_the_other_goes_on(then, hosts, tmp_path):
    file = snapshot(tmp_path, size=32 * MIB)
    ours, victims, impostors = hosts
    with (
        source(tmp_path, file, "--max-postcopy-bandwidth", "1MiB/s", *with_tls(ours)) as here,
        Proxy(upstream_of(here.address)) as proxy,
        destination(tmp_path, "--from", proxy.address, *with_tls(victims)) as there,
        Vmm(f"{tmp_path}/uffd.sock", ((32 * MIB, 0),), file=file) as vmm,
    ):
        there.until(placed(100))
        migration_id = seen_in(proxy)
        proxy.refuses = then == "comes first"
        if then == "comes first":
            proxy.cut()
            here.until(lambda now: now["destinations"] == [])
        with Impostor(here.address, migration_id, impostors) as impostor:
            if isinstance(impostor.answer, LayoutOffer):
                impostor.run()
                if then == "says lost":
                    impostor.channel.send(Refuse(GONE, "the impostor says so"))
                    here.until_log("lost after the switchover")
            proxy.refuses = False
            if then != "comes first":
                assert there.status()["processes"][0]["reconnects"] == 0
                proxy.cut()
            there.until(reconnects(1))
            assert isinstance(impostor.answer, Refuse)
            assert (impostor.answer.code, "somebody else's" in impostor.answer.text) == ("protocol", True)
            assert impostor.channel.receive() is None
        here.ask("set", rate=0)
        assert vmm.call("wrong") == []
        assert "poisoned" not in there.log
        here.until_log("closed .*it is somebody else's")
        assert here.log.count("somebody else's") == 1
