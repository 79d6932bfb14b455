"""The product's side: what the daemons are told, and how their metrics are read. No daemon is started here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time

import pytest

from agent.bench import scrape
from agent.bench.link import Link
from agent.bench.product import Placement, ProductSetup, _destination_arguments, _source_arguments, own_bytes
from agent.bench.runner import Plan
from agent.bench.scrape import parse_metrics, scraping

QUESTION = b"GET /metrics HTTP/1.1\r\nHost: agent\r\n\r\n"
METRICS = """# HELP postcopy_faults_total Page faults read from userfaultfd.
# TYPE postcopy_faults_total counter
postcopy_faults_total{kind="missing"} 40.0
postcopy_faults_total{kind="minor"} 2.0
postcopy_fault_latency_seconds_bucket{le="1e-06"} 1.0
postcopy_fault_latency_seconds_count 42.0
"""


def test_metrics_are_summed_over_their_labels():
    assert parse_metrics(METRICS) == {"postcopy_faults_total": 42.0, "postcopy_fault_latency_seconds_count": 42.0}


def test_a_plan_pins_both_ends_or_none():
    assert Plan().placement == Placement()
    pinned = Plan(source_cpus=0b1, destination_cpus=0b1010).placement
    assert pinned.source == ("taskset", "-c", "0")
    assert pinned.destination == ("taskset", "-c", "1,3")
    assert pinned.pinning == "source 0, destination 1,3"


def test_a_link_goes_before_the_pins():
    placement = Plan(source_cpus=1, destination_cpus=2).placement.through(Link("a", "b", "10.0.0.2"))
    assert placement.source == ("ip", "netns", "exec", "a", "taskset", "-c", "0")
    assert placement.host == "10.0.0.2"
    assert not placement.reachable
    assert Placement().reachable


def test_own_memory_is_what_is_not_shared_memory():
    assert own_bytes(os.getpid()) > 1 << 20
    assert own_bytes(1 << 30) == 0


def test_a_trace_is_of_the_destinations_faults(tmp_path):
    asked = ProductSetup(trace=True)
    told = _destination_arguments(asked, Placement(), tmp_path)
    assert told[told.index("--trace") + 1] == str(tmp_path / "faults.trace")
    assert "--trace" not in _destination_arguments(ProductSetup(), Placement(), tmp_path)
    assert "--trace" not in _source_arguments(asked)


def test_who_reads_again_and_again_reads_every_answer_and_comes_back():
    """Whatever pieces an answer comes in, and however often the agent closes the connection."""
    asked, enough = [], threading.Event()

    def answer(listening):
        for _ in range(2):
            connection, _ = listening.accept()
            with connection:
                for _ in range(3):
                    asked.append(connection.recv(4096))
                    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    connection.sendall(bytes(100_000))
                asked.append(connection.recv(4096))  # and leaves without an answer
        listening.close()
        enough.set()

    async def read_on(address):
        async with scraping([address, None], 50):
            assert await asyncio.to_thread(enough.wait, 20)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        answering = threading.Thread(target=answer, args=(listening,))
        answering.start()
        asyncio.run(read_on(listening.getsockname()))
        answering.join()
    assert asked == [QUESTION] * 8


def test_of_what_should_be_read_again_and_again_good_answers_are_counted():
    done = threading.Event()

    def answer(listening):
        connection, _ = listening.accept()
        with connection, listening:
            for status in (b"200 OK", b"200 OK", b"500 Internal Server Error"):
                connection.recv(4096)  # so the answer before was counted
                connection.sendall(b"HTTP/1.1 " + status + b"\r\n\r\n")
        done.set()

    async def read_on(address):
        async with scraping([address, None], 50) as scraped:
            assert await asyncio.to_thread(done.wait, 20)
        return scraped

    listening = socket.create_server(("127.0.0.1", 0))
    answering = threading.Thread(target=answer, args=(listening,))
    answering.start()
    scraped = asyncio.run(read_on(listening.getsockname()))
    answering.join()
    assert scraped.answers == 2
    assert scraped.wanted >= 2 * 3  # a period lies before each of three at one of the two


def test_one_who_is_not_there_is_in_nobodys_way_and_is_asked_once_he_is():
    """Nobody listens at one of two addresses until the other one has answered some questions."""

    def answer(listening, answered):
        connection, _ = listening.accept()
        with connection, contextlib.suppress(ConnectionResetError):
            for count in range(10_000):
                if not connection.recv(4096):
                    return
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                if count == 5:
                    answered.set()

    async def asked(listening):
        answered = threading.Event()
        answering.append(threading.Thread(target=answer, args=(listening, answered)))
        answering[-1].start()
        assert await asyncio.to_thread(answered.wait, 20)

    async def story():
        async with scraping([early.getsockname(), late.getsockname()], 100):
            await asked(early)
            late.listen()
            await asked(late)

    answering = []
    with socket.create_server(("127.0.0.1", 0)) as early, socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        asyncio.run(story())
        for one in answering:
            one.join()


@pytest.mark.parametrize("number", [0, 1])
def test_one_asks_in_every_other_window(number):
    """The window that is now lasts for longer than this test: an even one, an odd one."""
    now = time.monotonic_ns()
    window_ns = now * 2 if number == 0 else now * 3 // 4
    asked = threading.Event()

    def answer(listening):
        connection, _ = listening.accept()
        with connection, contextlib.suppress(ConnectionResetError):  # it leaves with an answer unread
            while connection.recv(4096):
                asked.set()
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

    async def read_on(address):
        async with scraping([address], 100, window_ns=window_ns) as scraped:
            await asyncio.to_thread(asked.wait, 20 if number else 0.3)
        return scraped

    with socket.create_server(("127.0.0.1", 0)) as listening:
        answering = threading.Thread(target=answer, args=(listening,))
        answering.start()
        asyncio.run(read_on(listening.getsockname()))
        if not number:  # nobody has come
            socket.create_connection(listening.getsockname()).close()
        answering.join()
    assert asked.is_set() == scrape.asks(now, window_ns) == bool(number)


def test_nobody_is_asked_twice_without_an_answer():
    questions, period = [], 0.01

    def answer(listening):
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.settimeout(20 * period)
            with pytest.raises(TimeoutError):
                connection.recv(4096)
            connection.settimeout(20)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            questions.append(connection.recv(4096))
        enough.set()

    async def read_on(address):
        async with scraping([address], int(1 / period)):
            assert await asyncio.to_thread(enough.wait, 20)

    enough = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        answering = threading.Thread(target=answer, args=(listening,))
        answering.start()
        asyncio.run(read_on(listening.getsockname()))
        answering.join()
    assert questions == [QUESTION]
