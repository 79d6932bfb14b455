"""Whatever goes wrong before Run: one clear line, the right status, and the source's guest runs on and shows it."""

import re
import signal
import socket

import pytest

from postcopy.wire.control import Cancel, Hello, Loaded, Ready, Refuse, Run, Running, State, Welcome, encode
from postcopy.wire.frame import FrameType, Header
from postcopy.wire.frame import pack as pack_frame
from postcopy.wire.preamble import Preamble, Role, pack

from .agents import AS_NOBODY, Command, destination, run, source
from .fakes import OFFER, FakeDestination, FakeSource, connect, ends

# A message the type of which is an array in an array, a thousand times.
NESTED = (1004).to_bytes(4, "little") + b"\x81\xa1t" + b"\x91" * 1000 + b"\xc0"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A source whose guest survives every test of this module."""
    with source(tmp_path_factory.mktemp("source"), "--steps-per-second", "5000", size="16MiB") as daemon:
        yield daemon
        assert run("check", "--admin", daemon.admin).status == 0
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A destination that is as good as new after every test of this module."""
    with destination(tmp_path_factory.mktemp("destination")) as daemon:
        yield daemon
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def still_owned(here, done, status, text):
    assert done.status == status, done.err
    assert text in done.one_line()
    now = here.status()
    assert now["owner"] == "source"
    assert now["state"] in {"failed", "cancelled"}
    here.runs_on()


# --- the destination is not there, or does not answer ---------------------------------------------------------------


def test_nobody_listens(here):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = run("migrate", "--admin", here.admin, f"tcp:127.0.0.1:{port}")
    still_owned(here, done, 4, f"cannot connect to tcp:127.0.0.1:{port}: Connection refused")


def test_no_such_host(here):
    done = run("migrate", "--admin", here.admin, "tcp:nowhere.invalid:7000", "--insecure")
    still_owned(here, done, 4, "cannot find the host of tcp:nowhere.invalid:7000")


def test_a_time_limit(here):
    with FakeDestination() as fake:
        done = run("migrate", "--admin", here.admin, fake.address, "--timeout", "0.5")
    still_owned(here, done, 7, "the time limit passed before the switchover")


def test_cancel(here):
    with FakeDestination() as fake, Command("migrate", "--admin", here.admin, fake.address) as migration:
        fake.upto_offer()
        assert here.status()["state"] == "setup"
        busy = run("migrate", "--admin", here.admin, fake.address)
        assert (busy.status, busy.one_line()) == (2, "postcopy: a migration is running already")
        assert run("cancel", "--admin", here.admin, "--json").json == {"schema_version": 1, "cancelled": True}
        assert isinstance(fake.control.receive(), Cancel)
        still_owned(here, migration.result(), 7, "cancelled by the user")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_cancels(number, here):
    with FakeDestination() as fake, Command("migrate", "--admin", here.admin, fake.address) as migration:
        fake.upto_offer()
        migration.process.send_signal(number)
        still_owned(here, migration.result(), 7, "cancelled by the user")


def test_what_failed_is_an_object_too(here):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = run("migrate", "--admin", here.admin, f"tcp:127.0.0.1:{port}", "--json")
    still_owned(here, done, 4, "Connection refused")
    text = f"cannot connect to tcp:127.0.0.1:{port}: Connection refused"
    told = {"outcome": "failed", "owner": "source", "exit_status": 4}
    assert done.json == {"schema_version": 1, "error": text, **told}
    assert here.status()["ended"] == {"text": text, **told}


def test_nothing_to_cancel(here):
    done = run("cancel", "--admin", here.admin)
    assert (done.status, done.one_line()) == (2, "postcopy: no migration can be cancelled: there is none")


def test_memory_does_not_leave_the_host_in_plain_unasked(here):
    done = run("migrate", "--admin", here.admin, "tcp:192.0.2.1:7000")
    assert done.status == 2
    assert "add --insecure" in done.one_line()


# --- the destination goes away or talks nonsense, at each step ------------------------------------------------------


def hang_up(fake):
    fake.control.close()


def say_http(fake):
    fake.control.socket.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def say_run(fake):
    fake.control.send(Run())


def say_too_much(fake):
    fake.control.socket.sendall((1 << 30).to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("step", "act", "text"),
    [
        ("upto_hello", hang_up, "closed the connection"),
        ("upto_offer", hang_up, "closed the connection"),
        ("upto_attached", hang_up, "closed the connection"),
        ("upto_hello", say_http, "the destination broke the protocol: control message of 1347703880 bytes"),
        ("upto_offer", say_run, "Run is not allowed in state setup"),
        ("upto_attached", say_too_much, "control message of 1073741824 bytes: the limit is"),
    ],
)
def test_a_destination_that_misbehaves(here, step, act, text):
    with FakeDestination() as fake, Command("migrate", "--admin", here.admin, fake.address) as migration:
        getattr(fake, step)()
        if step == "upto_attached":
            fake.control.expect(State)  # the guest stands still now
        act(fake)
        still_owned(here, migration.result(), 4, text)


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (Header(FrameType.REQUEST, 9, 0, 4096), "(region)"),
        (Header(FrameType.REQUEST, 0, 1 << 40, 4096), "(range)"),
        (Header(FrameType.REQUEST, 0, 100, 4096), "(alignment)"),
        (Header(FrameType.REQUEST, 0, 0, 8192), "(limit)"),
        (Header(FrameType.PAGES, 0, 0, 4096), "(type)"),
        (Header(FrameType.REQUEST, 0, 0, 4096, magic=0x4554), "(magic)"),
    ],
)
def test_a_request_that_makes_no_sense(here, header, text):
    with FakeDestination() as fake, Command("migrate", "--admin", here.admin, fake.address) as migration:
        fake.upto_attached()
        fake.data[Role.URGENT].sendall(pack_frame(header))
        still_owned(here, migration.result(), 4, text)


@pytest.mark.parametrize("role", [Role.URGENT, Role.PUSH])
def test_a_data_connection_that_ends(here, role):
    with FakeDestination() as fake, Command("migrate", "--admin", here.admin, fake.address) as migration:
        fake.upto_attached()
        fake.control.expect(State)
        fake.data[role].close()
        still_owned(here, migration.result(), 4, f"the {role.name.lower()} connection was closed by the destination")


def test_a_destination_that_refuses(here):
    with FakeDestination() as fake, Command("migrate", "--admin", here.admin, fake.address) as migration:
        fake.upto_offer()
        fake.control.send(Refuse("guest", "no such guest in this house"))
        still_owned(here, migration.result(), 4, "the destination refused: no such guest in this house")


def test_a_destination_that_never_loads(here):
    with FakeDestination() as fake, Command("migrate", "--admin", here.admin, fake.address) as migration:
        fake.upto_attached()
        fake.control.expect(State)
        still_owned(here, migration.result(), 4, "the destination did not answer in time (loading)")


# --- strangers at the destination's port ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", r"not a postcopy connection: it begins with 'GET / HT'"),
        (bytes(range(100, 164)), r"not a postcopy connection: it begins with"),
        (pack(Preamble(Role.CONTROL))[:40], r"the connection ended inside its preamble, after 40 of 64 bytes"),
        (b"", r"the connection ended before it said anything"),
        (pack(Preamble(Role.CONTROL, 9)), r"version 9 is not supported: this agent speaks 2 to 3"),
        (b"POSTCOPY" + b"\x01\x00\x07\x00" + bytes(52), r"preamble refused: unknown role 7"),
        (pack(Preamble(Role.URGENT, 3, b"i" * 16, b"t" * 32)), r"a data connection, and no migration is running"),
        (pack(Preamble(Role.CONTROL)) + b"\xff\xff\xff\xff", r"control message of 4294967295 bytes"),
        (pack(Preamble(Role.CONTROL)) + b"\x03\x00\x00\x00abc", r"control message refused"),
        (pack(Preamble(Role.CONTROL)) + b"\x50\x00\x00\x00abc", r"ended inside a control message"),
        (pack(Preamble(Role.CONTROL)) + NESTED, r"control message refused: more than 32 maps and arrays"),
    ],
)
def test_a_stranger_is_closed_with_one_line(there, sent, reason):
    before = len(there.log.splitlines())
    with connect(there.address) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert ends(connection)
        name = "{}:{}".format(*connection.getsockname())
    there.until_log(f"closed {name}: .*{reason}")
    lines = there.log.splitlines()[before:]
    assert len(lines) == 1, lines
    assert there.status()["state"] in {"none", "failed", "cancelled"}


def told_of(daemon):
    """Count those that are said to have been silent, each by itself or, of 50 within 5 s, as one of the others."""
    others = re.findall(r"closed (\d+) more connections within 5 s", daemon.log)
    return daemon.log.count("no preamble within 5 s") + sum(map(int, others))


def test_silence_is_not_waited_for_and_many_strangers_are_not_let_in(there):
    connections = [connect(there.address) for _ in range(72)]
    try:
        there.until(lambda _now: told_of(there) >= 64)
        assert told_of(there) == 64
        assert there.log.count("64 younger connections have not proved themselves either") == 8
    finally:
        for connection in connections:
            connection.close()


def test_a_source_in_another_version(there):
    with FakeSource(there.address) as fake:
        fake.control.send(Hello((8, 9), "from the future"))
        refusal = fake.control.expect(Refuse)
        assert refusal.code == "version"
        assert refusal.text == "the source speaks version 8 to 9, this destination version 2 to 3"
        assert fake.control.receive() is None


def test_a_source_in_the_version_before(there):
    with FakeSource(there.address) as fake:
        fake.greet((2, 2))
        assert fake.welcome.version == 2


def test_two_sources(there):
    with FakeSource(there.address) as first, FakeSource(there.address) as second:
        first.greet().offer()
        second.control.send(Hello((2, 3), "late"))
        assert second.control.expect(Refuse).code == "busy"


@pytest.mark.parametrize("wrong", ["token", "id"])
def test_a_data_connection_without_proof(there, wrong):
    with FakeSource(there.address) as fake:
        fake.greet().offer()
        identity = {"id": fake.welcome.migration_id, "token": fake.welcome.token}
        identity[wrong] = b"x" * len(identity[wrong])
        with fake.dial(Role.URGENT, identity["id"], identity["token"]) as connection:
            assert ends(connection)
        there.until_log("unknown migration or wrong token")
        fake.attach()  # the real ones come in as if nothing had been


@pytest.mark.parametrize(
    ("header", "role", "text"),
    [
        (Header(FrameType.PAGES, 9, 0, 4096), Role.PUSH, "(region)"),
        (Header(FrameType.PAGES, 0, 1 << 20, 4096), Role.PUSH, "(range)"),
        (Header(FrameType.PAGES, 0, 1, 4096), Role.URGENT, "(alignment)"),
        (Header(FrameType.PAGES, 0, 0, 16 << 20), Role.PUSH, "(limit)"),
        (Header(FrameType.REQUEST, 0, 0, 4096), Role.PUSH, "(type)"),
        (Header(FrameType.PAGES, 0, 0, 4096, flags=1), Role.URGENT, "(reserved)"),
    ],
)
def test_a_frame_that_makes_no_sense(there, header, role, text):
    with FakeSource(there.address) as fake:
        fake.greet().offer().attach()
        fake.data[role].sendall(pack_frame(header))
        cancel = fake.control.expect(Cancel)
        assert text in cancel.text
        assert fake.control.receive() is None
    there.until(lambda now: now["state"] == "failed")


def test_a_source_that_says_what_it_may_not(there):
    for nonsense in (Ready(), Loaded(), Running(1.0), Welcome(3, b"i" * 16, b"t" * 32, "x")):
        with FakeSource(there.address) as fake:
            fake.greet()
            fake.control.send(nonsense)
            assert fake.control.expect(Refuse).code == "protocol"
            assert fake.control.receive() is None


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"type": "floppy"}, "layout", "unknown memory type 'floppy'"),
        ({"page_size": 65536}, "layout", "pages of 65536 bytes"),
        ({"size": (1 << 20) + 512 * 9}, "layout", "not a multiple of the page size"),
        ({"size": 1 << 50}, "memory", "of shmem asked for"),
        ({"type": "hugetlb-2M", "page_size": 2 << 20, "size": 1 << 40}, "memory", "huge pages asked for"),
    ],
)
def test_an_offer_that_cannot_be_met(there, change, code, text):
    region = OFFER.regions[0]
    fields = {"type": region.type, "page_size": region.page_size, "size": region.size, **change}
    offer = type(OFFER)((type(region)(**fields),), OFFER.guest)
    with FakeSource(there.address) as fake:
        fake.greet()
        fake.control.send(offer)
        refusal = fake.control.expect(Refuse)
        assert (refusal.code, text in refusal.text) == (code, True), refusal


def test_a_guest_that_nobody_knows(there):
    offer = type(OFFER)(OFFER.regions, type(OFFER.guest)("poltergeist", 1))
    with FakeSource(there.address) as fake:
        fake.greet()
        fake.control.send(offer)
        refusal = fake.control.expect(Refuse)
        assert refusal.code == "guest"
        assert "no guest of kind 'poltergeist'" in refusal.text


@pytest.mark.parametrize("state", [b"\xc1", b"\x80", b"\x93\x01\x02\x03"])
def test_a_state_that_is_no_guest(there, state):
    with FakeSource(there.address) as fake:
        fake.greet().offer().attach()
        fake.control.send(State(state, 1.0, "boot"))
        assert fake.control.expect(Refuse).code == "guest"


def test_after_all_that_a_guest_still_gets_through(there, tmp_path):
    """Runs behind the tests above: the same destination, whoever came before."""
    with source(tmp_path, size="8MiB") as one:
        assert run("migrate", "--admin", one.admin, there.address).status == 0
    there.runs_on()
    assert run("check", "--admin", there.admin).status == 0
    with FakeSource(there.address) as fake:
        fake.control.send(Hello((2, 3), "late"))
        assert fake.control.expect(Refuse).text == "this destination has a guest already"
    assert len(encode(Hello((2, 3), "late"))) < 64


# --- what this host lacks -------------------------------------------------------------------------------------------


def test_port_taken(there):
    done = run("destination", "--listen", there.address)
    assert done.status == 2
    assert done.one_line().endswith(f"cannot listen on {there.address}: Address already in use")


def test_metrics_port_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for role in ("source", "destination"):
            done = run(role, "--metrics", f"127.0.0.1:{port}")
            assert done.status == 2
            assert f"metrics: cannot listen on tcp:127.0.0.1:{port}: Address already in use" in done.one_line()


def test_no_permission_for_userfaultfd():
    done = run("destination", program=AS_NOBODY)
    assert done.status == 3
    for way in ("/dev/userfaultfd", "vm.unprivileged_userfaultfd", "CAP_SYS_PTRACE"):
        assert way in done.one_line()


def test_a_destination_without_huge_pages(tmp_path, huge_pages):
    from postcopy.kernel import memory_type

    huge_pages("hugetlb-2M", 16)
    # the source takes more than half of the pool, so the destination on the same host cannot have as much
    pages = memory_type("hugetlb-2M").pool().unclaimed // 2 + 1
    with (
        source(tmp_path, "--memory", "hugetlb-2M", size=pages << 21) as one,
        destination(tmp_path) as there,
    ):
        done = run("migrate", "--admin", one.admin, there.address)
        still_owned(one, done, 4, f"the destination refused: hugetlb-2M: {pages} huge pages asked for")
        assert there.status()["state"] == "failed"


def test_a_killed_destination_before_run(here, tmp_path):
    with destination(tmp_path) as there:
        there.signal(signal.SIGKILL)
        there.wait()
        done = run("migrate", "--admin", here.admin, there.address)
    still_owned(here, done, 4, "Connection refused")
