"""A probe from both ends: what would come of a migration, found out without one.

At the source an address and a layout enter, the destination's answer leaves. At the destination an offer enters and
is tried out on the very way that a migration would take; nothing of it is left when the answer leaves.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from postcopy.errors import PostcopyError
from postcopy.link.address import Address
from postcopy.link.dial import dial_control
from postcopy.link.guest import Kinds
from postcopy.link.host import describe_host
from postcopy.link.interpreter import Interpreter, failure_of
from postcopy.link.prepare import MemoryTypes, prepare
from postcopy.link.source import SOFTWARE, error_of
from postcopy.link.tls import Credentials, versions_over
from postcopy.pages.regions import Layout
from postcopy.session.commands import Command, Connect
from postcopy.session.events import Connected, Started
from postcopy.session.probe import ProbeMachine
from postcopy.wire.control import GuestOffer, Hello, LayoutOffer, Probe, Probed
from postcopy.wire.messages import READY
from postcopy.wire.version import VERSION, VERSION_MIN


def try_out(offer: LayoutOffer, mode: str, kinds: Kinds, types: MemoryTypes) -> Probed:
    """Prepare for the offer as for a guest that comes, give everything back, and say what came of it; in a thread."""
    answer, text = READY, ""
    try:
        prepare(offer, mode, kinds, types).close()
    except (PostcopyError, OSError) as error:
        failure = failure_of(error, 0.0)
        answer, text = failure.code, failure.text
    return Probed(answer, text, mode, describe_host())


async def ask(
    address: Address,
    layout: Layout,
    guest: GuestOffer,
    *,
    tls: Credentials | None = None,
    versions: tuple[int, int] = (VERSION_MIN, VERSION),
) -> Probed:
    """Ask the destination at `address` whether such a guest could come now.

    Raises MigrationFailed where it does not say: it cannot be reached, it is busy, it is too old.
    """
    offer = LayoutOffer.of(layout, guest)
    machine = ProbeMachine(Hello(versions_over(tls, versions), SOFTWARE), Probe(offer.regions, offer.guest))
    interpreter = _ProbeInterpreter(machine, address, tls)
    interpreter.post(Started(interpreter.now()))
    finish = await interpreter.run()
    if machine.answer is not None:
        return machine.answer
    raise error_of(finish)


class _ProbeInterpreter(Interpreter):
    """Performs the one command of its own that asking needs."""

    def __init__(self, machine: ProbeMachine, address: Address, tls: Credentials | None) -> None:
        super().__init__("probe", machine)
        self._address = address
        self._tls = tls

    def performers(self) -> dict[type[Command], Callable[[Any], Awaitable[None]]]:
        """Return how to connect."""
        return {Connect: self._connect}

    async def _connect(self, _command: Connect) -> None:
        self.spawn(self._dial())

    async def _dial(self) -> None:
        self.listen(await dial_control(self._address, self._tls))
        self.post(Connected(self.now()))
