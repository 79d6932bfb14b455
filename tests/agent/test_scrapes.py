"""Whoever asks for metrics: how they are answered, and that those who ask for nothing are in nobody's way."""

import asyncio
import contextlib
import http.client
import resource
import urllib.parse
from pathlib import Path

import pytest
import uvloop

from agent import scrapes
from agent.scrapes import Scrapes
from postcopy.link.address import TcpAddress

from .agents import destination, run, scrape, source
from .outsiders import Crowd

TEXT = "postcopy_up 1\n"


def served(ask, text=lambda: TEXT):
    """Serve a text while `ask(host, port)` runs in a thread; return what it returns."""

    async def body():
        server = Scrapes(text)
        url = urllib.parse.urlsplit(server.open(TcpAddress("127.0.0.1", 0)))
        try:
            return await asyncio.to_thread(ask, url.hostname, url.port)
        finally:
            await server.close()

    return uvloop.run(body())


@contextlib.contextmanager
def client(host, port):
    with contextlib.closing(http.client.HTTPConnection(host, port, timeout=8)) as connection:
        yield connection


def asked(connection, method="GET", path="/metrics", **more):
    connection.request(method, path, **more)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


# --- answers ---------------------------------------------------------------------------------------------------------


def test_one_connection_is_answered_again_and_again_whatever_it_asks_for():
    def ask(host, port):
        with client(host, port) as connection:
            found = [
                asked(connection),
                asked(connection, path="/metrics?name[]=postcopy_up"),
                asked(connection, method="HEAD"),
                asked(connection, path="/"),
                asked(connection, method="HEAD", path="/"),
                asked(connection, method="POST", body=b"x" * 100),
            ]
            first = connection.sock
            assert asked(connection) == (200, TEXT)
            assert connection.sock is first
            return found

    assert served(ask) == [
        (200, TEXT),
        (200, TEXT),
        (200, ""),
        (404, "metrics are at /metrics\n"),
        (404, ""),
        (405, "metrics are read by GET\n"),
    ]


SAYS_LAST = b"\r\nConnection: close\r\n"
OLD = b"GET /metrics HTTP/1.0\r\n\r\n"
UPGRADES = b"GET /metrics HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"


@pytest.mark.parametrize("pieces", [[OLD], [OLD[:1], OLD[1:9], OLD[9:-3], OLD[-3:]], [UPGRADES]])
def test_a_client_of_old_or_of_something_else_is_answered_and_left(pieces):
    def ask(host, port):
        return say(host, port, pieces)

    answer = served(ask)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert SAYS_LAST in answer
    assert answer.endswith(f"\r\n\r\n{TEXT}".encode())


def test_of_many_requests_at_once_one_is_answered():
    def ask(host, port):
        return say(host, port, [b"GET /metrics HTTP/1.1\r\n\r\n" * 100])

    answer = served(ask)
    assert answer.count(b"HTTP/1.1 200 OK") == answer.count(SAYS_LAST) <= 1  # none where the end overtakes it


def test_an_answer_says_whether_it_is_the_last_one():
    def ask(host, port):
        with client(host, port) as connection:
            said = []
            for headers in ({}, {"Connection": "keep-alive"}, {"Connection": "close"}):
                connection.request("GET", "/metrics", headers=headers)
                answer = connection.getresponse()
                said.append(answer.getheader("Connection"))
                answer.read()
            return said

    assert served(ask) == [None, None, "close"]


@pytest.mark.parametrize(
    "piece",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET /metrics HTTP/9\r\n\r\n",
        b"GET /" + b"a" * 2 * scrapes.SCRAPE_BYTES_MAX,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * scrapes.SCRAPE_BYTES_MAX,
        b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" + b"a" * 100000,
    ],
)
def test_what_is_no_request_ends_its_connection_and_no_other(piece):
    def ask(host, port):
        with client(host, port) as connection:
            assert asked(connection) == (200, TEXT)
            said = say(host, port, [piece])
            assert asked(connection) == (200, TEXT)
            return said

    answer = served(ask)
    assert answer == b"" or (answer.startswith(b"HTTP/1.1 400") and SAYS_LAST in answer)


def test_a_mistake_of_ours_is_an_answer_and_ends_nothing(caplog):
    def broken_once():
        if not mistakes:
            mistakes.append(True)
            raise ZeroDivisionError
        return TEXT

    def ask(host, port):
        with client(host, port) as connection:
            return asked(connection)[0], asked(connection)

    mistakes = []
    assert served(ask, broken_once) == (500, (200, TEXT))
    assert "the metrics cannot be told" in caplog.text


def say(host, port, pieces):
    """Say something piece by piece; return all that is answered, up to the end."""
    heard = b""
    with client(host, port) as connection, contextlib.suppress(ConnectionError):
        connection.connect()
        for piece in pieces:
            connection.sock.sendall(piece)
        while data := connection.sock.recv(4096):
            heard += data
    return heard


# --- strangers -------------------------------------------------------------------------------------------------------


def test_who_says_a_little_at_a_time_is_closed_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(scrapes, "SCRAPE_SECONDS", 0.2)

    def ask(host, port):
        with client(host, port) as connection, contextlib.suppress(ConnectionError):
            connection.connect()
            connection.sock.settimeout(0.02)  # the pace of a slow-loris, not an order
            connection.sock.sendall(b"GET /metrics HTTP/1.1\r\n")
            for _ in range(1000):
                connection.sock.sendall(b"a: b\r\n")
                with contextlib.suppress(TimeoutError):
                    assert connection.sock.recv(4096) == b""
                    return True
            return False
        return True

    assert served(ask)


def test_each_answer_gives_time_anew(monkeypatch):
    now = 100.0
    monkeypatch.setattr(scrapes, "SCRAPE_SECONDS", 0.01)  # so often is looked at, by a clock that is in our hand
    monkeypatch.setattr(scrapes.time, "monotonic", lambda: now)

    def ask(host, port):
        nonlocal now
        with client(host, port) as silent, client(host, port) as asking:
            silent.connect()
            silent.sock.sendall(b"GET /met")
            first = asked(asking), asking.sock
            now += 0.008
            assert (asked(asking), asking.sock) == first
            now += 0.008
            assert silent.sock.recv(4096) == b""
            assert (asked(asking), asking.sock) == first
            now += 0.011
            return asking.sock.recv(4096)

    assert served(ask) == b""


@pytest.mark.parametrize("soon", [True, False])
def test_who_asks_again_and_again_is_answered_once_a_round(monkeypatch, soon):
    """On one connection, and where the first two came soon after each other; others are answered at once meanwhile."""
    told, waiting = [], []

    async def wait_for_round():
        waiting.append(asyncio.Event())
        await waiting[-1].wait()

    def begin_round():
        while waiting:
            waiting.pop().set()

    def text():
        told.append(TEXT)
        return TEXT

    monkeypatch.setattr(scrapes, "next_round", wait_for_round)
    monkeypatch.setattr(scrapes, "ROUND_SECONDS", 1000 if soon else 0)

    async def body():
        server, loop = Scrapes(text), asyncio.get_running_loop()
        url = urllib.parse.urlsplit(server.open(TcpAddress("127.0.0.1", 0)))

        def answered_before_it():
            with client(url.hostname, url.port) as greedy:
                assert [asked(greedy), asked(greedy)] == 2 * [(200, TEXT)]
                found = []
                for _ in range(2):
                    greedy.request("GET", "/metrics")
                    for _ in range(3):
                        with client(url.hostname, url.port) as other:
                            assert asked(other) == (200, TEXT)
                    found.append(len(told))
                    loop.call_soon_threadsafe(begin_round)
                    assert greedy.getresponse().read() == TEXT.encode()
                return found

        try:
            return await asyncio.to_thread(answered_before_it)
        finally:
            await server.close()

    assert uvloop.run(body()) == ([5, 9] if soon else [6, 10])


def test_who_comes_and_goes_takes_no_place():
    """However many do, one after the other: whoever waits beside them is not the one that waits longest of too many."""

    def ask(host, port):
        with client(host, port) as kept:
            assert asked(kept) == (200, TEXT)
            first = kept.sock
            for _ in range(3 * scrapes.SCRAPERS_MAX):
                with client(host, port) as visitor:
                    assert asked(visitor) == (200, TEXT)
            assert asked(kept) == (200, TEXT)
            return kept.sock is first

    assert served(ask)


LONG = "a" * (32 << 20)  # more than the kernel takes of somebody who does not read


def test_who_does_not_read_has_one_answer_waiting():
    """It is the next one that is not made: its request is left with the kernel."""
    told = []

    def text():
        told.append(TEXT if told else LONG)
        return told[-1]

    def ask(host, port):
        with client(host, port) as slow, client(host, port) as other:
            slow.connect()
            slow.sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            slow.sock.recv(1)
            slow.sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            for _ in range(3):
                assert asked(other) == (200, TEXT)
            before, heard = len(told), b""
            while not heard.endswith(TEXT.encode()):
                heard = slow.sock.recv(1 << 20)
            return before, len(told)

    assert served(ask, text) == (4, 5)


def test_who_does_not_read_is_closed_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(scrapes, "SCRAPE_SECONDS", 0.2)

    def ask(host, port):
        with client(host, port) as slow, client(host, port) as silent:
            slow.connect()
            slow.sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            heard = len(slow.sock.recv(1))
            silent.connect()
            assert silent.sock.recv(1) == b""  # it waited less long
            while data := slow.sock.recv(1 << 20):
                heard += len(data)
            return heard

    assert served(ask, lambda: LONG) < len(LONG)


def descriptors(daemon):
    return len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))


def test_thousands_who_ask_for_nothing_are_in_nobodys_way(tmp_path, many_descriptors):
    """At an agent that may have few descriptors: metrics are told and a guest comes while they are there."""
    with (
        destination(tmp_path, "--metrics", "127.0.0.1:0") as there,
        source(tmp_path, size="8MiB") as here,
    ):
        url = there.until_log(r"metrics: (http://\S+)")[1]
        metrics = f"tcp:{urllib.parse.urlsplit(url).netloc}"
        before = descriptors(there)
        few = before + scrapes.SCRAPERS_MAX + 40
        resource.prlimit(there.process.pid, resource.RLIMIT_NOFILE, (few, few))
        with Crowd(metrics, 2000), Crowd(metrics, 100, b"GET /met") as slow:
            slow.trickle(b"r")
            assert scrape(url)['postcopy_migration_state{state="none"}'] == 1
            assert descriptors(there) <= before + scrapes.SCRAPERS_MAX + 1
            assert run("migrate", "--admin", here.admin, there.address).status == 0
            there.until(lambda now: now["state"] == "completed")
            slow.trickle(b"i")
            assert scrape(url)['postcopy_migration_state{state="completed"}'] == 1
        there.runs_on()
        assert "Traceback" not in there.log
        assert there.ask("check")["pages_mismatched"] == 0
