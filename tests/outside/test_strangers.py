"""Whoever dials an agent at which processes wait for a source, and is none: he holds nobody up, and fills no log."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from postcopy.limits import ANSWER_SECONDS, HEARD_OUT_SECONDS, LINES_MAX, LINES_SECONDS, OFFERED_SECONDS
from postcopy.link.address import parse_address
from postcopy.link.control import ControlChannel
from postcopy.link.dial import dial_control, dial_data
from postcopy.wire.control import GuestOffer, Hello, LayoutOffer, Loaded, Ready, RegionOffer, State, Welcome
from postcopy.wire.preamble import Preamble, Role, pack
from postcopy.wire.version import VERSION, VERSION_MIN
from tests.agent.agents import Command
from tests.agent.agents import source as guest_source
from tests.outside.vmm import MIB, PAGE, Vmm, destination

HELLO = Hello((VERSION_MIN, VERSION), "a stranger")
OFFER = LayoutOffer((RegionOffer("shmem", PAGE, 8 * MIB),), GuestOffer("outside", 1))
HANG_UPS = 70


@pytest.fixture
def waiting(tmp_path):
    """Return an agent at which a process waits, the process, and a source with a guest for it."""
    with (
        destination(tmp_path) as there,
        Vmm(f"{tmp_path}/uffd.sock") as vmm,
        guest_source(tmp_path, "--memory", "shmem:8MiB", "--steps", "100") as here,
    ):
        there.until(lambda now: now["waiting"] == 1)
        yield there, vmm, here


def talk(there, *messages):
    """Say these and return the open channel, in a loop of its own, and what was answered last."""

    async def say():
        channel = await dial_control(parse_address(there.address))
        for message in messages:
            channel.send(message)
            answer = await channel.receive()
        return channel, answer

    loop = asyncio.new_event_loop()
    return loop, *loop.run_until_complete(asyncio.wait_for(say(), 20))


def talk_up_to(there, step, versions):
    """Do all that a source does up to a step, and nothing more; return the open channel with its loop, and the rest."""
    address = parse_address(there.address)

    async def say():
        channel = await dial_control(address)
        channel.send(Hello(versions, "a stranger"))
        welcome = await channel.receive()
        channel.version = welcome.version
        channel.send(OFFER)
        assert isinstance(await channel.receive(), Ready)
        told = (welcome.version, welcome.migration_id, welcome.token)
        roles = () if step == "ready" else (Role.URGENT, Role.PUSH)
        data = [await dial_data(address, Preamble(role, *told)) for role in roles]
        if step == "loaded":
            channel.send(State(b"\x80", 0.0, "boot"))
            assert isinstance(await channel.receive(), Loaded)
        return channel, data

    loop = asyncio.new_event_loop()
    return loop, *loop.run_until_complete(asyncio.wait_for(say(), 20))


def offer_from(host, there):
    """Make an offer from another address of this machine; return the open channel in a loop of its own."""
    address = parse_address(there.address)

    async def say():
        connection = socket.socket()
        connection.bind((host, 0))
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (address.host, address.port))
        await loop.sock_sendall(connection, pack(Preamble(Role.CONTROL, VERSION_MIN)))
        channel = await ControlChannel.over(connection, "there")
        channel.send(HELLO)
        assert isinstance(await channel.receive(), Welcome)
        channel.send(OFFER)
        return channel

    loop = asyncio.new_event_loop()
    return loop, loop.run_until_complete(asyncio.wait_for(say(), 20))


def hears_ready(loop, channel):
    return isinstance(loop.run_until_complete(asyncio.wait_for(channel.receive(), 20)), Ready)


def hang_up(loop, channel):
    channel.abort()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def test_who_says_hello_and_no_more_holds_no_process_and_is_a_line_at_the_most(waiting):
    there, vmm, here = waiting
    before, began = there.log.count("\n"), time.monotonic()
    for _ in range(HANG_UPS):
        loop, channel, answer = talk(there, HELLO)
        assert isinstance(answer, Welcome)
        hang_up(loop, channel)
    loop, channel, _ = talk(there, HELLO)
    assert there.status()["waiting"] == 1
    with Command("migrate", "--admin", here.admin, there.address, "--json") as moving:
        assert moving.result(30).json["outcome"] == "completed"
    assert vmm.call("filled") > 0
    hang_up(loop, channel)
    lines = there.log.splitlines()[before:]
    strangers = [line for line in lines if "closed 127.0.0.1:" in line]
    whiles = 1 + (time.monotonic() - began) // LINES_SECONDS
    assert 1 <= len(strangers) <= LINES_MAX * whiles + 1
    assert len(lines) - len(strangers) < 12  # the guest's own migration


def test_who_makes_an_offer_and_hangs_up_gives_the_process_to_the_source_that_waits_for_it(waiting):
    there, vmm, here = waiting
    loop, channel, answer = talk(there, HELLO, OFFER)
    assert isinstance(answer, Ready)
    assert there.status()["waiting"] == 0
    with Command("migrate", "--admin", here.admin, there.address, "--json") as moving:
        here.until(lambda now: now["state"] == "setup")
        hang_up(loop, channel)
        assert moving.result(30).json["outcome"] == "completed"
    assert vmm.call("filled") > 0


@pytest.mark.parametrize(
    ("step", "versions"),
    [("ready", (3, 3)), ("attached", (3, 3)), ("loaded", (3, 3)), ("loaded", (2, 2))],
    ids=["ready", "attached", "loaded", "loaded-2"],
)
def test_who_makes_an_offer_and_stalls_holds_the_process_for_less_than_a_source_waits_for_it(step, versions, waiting):
    there, vmm, here = waiting
    assert OFFERED_SECONDS + HEARD_OUT_SECONDS < ANSWER_SECONDS
    loop, channel, data = talk_up_to(there, step, versions)
    assert there.status()["waiting"] == 0
    with Command("migrate", "--admin", here.admin, there.address, "--json") as moving:
        assert moving.result(40).json["outcome"] == "completed"
    assert vmm.call("filled") > 0
    hang_up(loop, channel)
    for one in data:
        one.close()


def test_strangers_who_stall_in_turn_do_not_keep_a_source_out(waiting):
    """On two hosts, each of which had its time: those that queued before the source would hold the process for long."""
    there, vmm, here = waiting
    hosts = ("127.0.0.2", "127.0.0.3")
    for host in hosts:
        stranger = offer_from(host, there)
        assert hears_ready(*stranger)
        hang_up(*stranger)
        there.until(lambda now: now["waiting"] == 1)
    strangers = [offer_from(hosts[0], there)]
    assert hears_ready(*strangers[0])
    strangers += [offer_from(host, there) for host in (*hosts, *hosts)]
    assert len(strangers[1:]) * OFFERED_SECONDS > 2 * ANSWER_SECONDS
    with Command("migrate", "--admin", here.admin, there.address, "--json") as moving:
        assert moving.result(40).json["outcome"] == "completed"
    assert vmm.call("filled") > 0
    for stranger in strangers:
        hang_up(*stranger)
