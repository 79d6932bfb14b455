"""The source as a library: `async with Source(...) as source: report = await source.migrate("tcp:HOST:PORT")`.

A guest and its memory enter once; each call of `migrate` is one attempt, with a machine and an interpreter of its own.
Leaving the block cancels a migration that has not reached its switchover and waits for one that has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Self

from postcopy import __version__
from postcopy.errors import (
    HostError,
    MigrationCancelled,
    MigrationFailed,
    MigrationLost,
    PostcopyError,
    UsageError,
)
from postcopy.kernel import Mapping
from postcopy.kernel.handover import seal_files
from postcopy.limits import POLL_MAX_NS
from postcopy.link import by_hand
from postcopy.link.address import Address, UnixAddress, parse_address
from postcopy.link.by_hand import Steered
from postcopy.link.endpoint import Endpoint
from postcopy.link.guest import MigratingGuest
from postcopy.link.keeping import Keeping, Record
from postcopy.link.report import Report, completed
from postcopy.link.source_interpreter import SourceInterpreter
from postcopy.link.tls import Credentials, versions_over
from postcopy.pages.regions import Layout
from postcopy.pump.source import SourceStats
from postcopy.session.commands import Finish
from postcopy.session.events import Started
from postcopy.session.source import SourceMachine
from postcopy.session.source_recovery import take_up
from postcopy.session.states import OWNERS, Owner, State
from postcopy.wire.control import GuestOffer, Hello, LayoutOffer
from postcopy.wire.latencies import Latencies
from postcopy.wire.messages import HANDED_OVER
from postcopy.wire.version import VERSION, VERSION_MIN

SOFTWARE = f"postcopy {__version__}"


class Source(Steered[SourceInterpreter]):
    """One guest on this host that may migrate away. The guest and the mappings are the caller's until they left.

    `give_up_after` is how many seconds a migration may be paused before its guest is given up, None: for ever.
    `keeping` keeps what another agent needs that takes the place of this one; it may be set between two migrations.
    `begun` is called with each migration that begins, before anything of it can be read here.
    """

    def __init__(
        self,
        mappings: Sequence[Mapping],
        guest: MigratingGuest,
        *,
        poll_max_ns: int = POLL_MAX_NS,
        versions: tuple[int, int] = (VERSION_MIN, VERSION),
        give_up_after: float | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        self.layout = Layout(tuple(mapping.region for mapping in mappings))
        self.report: Report | None = None
        self.finish: Finish | None = None
        self.begun: Callable[[SourceInterpreter], object] = lambda _: None
        self.mappings = mappings
        self.keeping = keeping
        self._guest = guest
        self._poll_max_ns = poll_max_ns
        self._versions = versions
        self._give_up_after = give_up_after
        self._running: asyncio.Task[Finish] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel a migration that has not reached its switchover, and wait for its end."""
        if self._running is not None:
            self.cancel("the source ends")
            await asyncio.wait({self._running})

    async def migrate(
        self,
        address: Address | str,
        *,
        timeout: float | None = None,
        push: bool = True,
        rate: int | None = None,
        tls: Credentials | None = None,
    ) -> Report:
        """Move the guest to the destination at `address`; return the report once every page is there.

        To one on this host (`unix:PATH`) the memory is handed over, not copied: `push` and `rate` are of no use then.

        `timeout` is how many seconds the switchover may take to come; `rate` limits the push, in bytes a
        second (0 or None: not at all); with `tls` every connection is encrypted. Raises what says who owns the guest:
        MigrationFailed, HostError and MigrationCancelled (the source runs it), MigrationLost.
        """
        self.check_free()
        self.finish = None
        where = parse_address(address) if isinstance(address, str) else address
        hello = Hello(versions_over(tls, self._versions), SOFTWARE)
        machine = SourceMachine(hello, self._offer(where), push=push, give_up_seconds=self._give_up_after)
        self._current = self._interpreter(machine, Endpoint(where), rate, tls)
        self._current.post(Started(self._current.now(), timeout))
        return await self._drive(self._current)

    async def take_up(self, record: Record, *, tls: Credentials | None = None) -> Report:
        """Go on with a migration whose agent is gone, as its record says; return and raise as migrate() does.

        HostError where the guest turns out to have run nowhere else and cannot be made here; its record stays.
        """
        elsewhere = parse_address(record.elsewhere) if record.elsewhere else None
        where = Endpoint(parse_address(record.address), elsewhere)
        hello = Hello(versions_over(tls, self._versions), SOFTWARE)
        offer = LayoutOffer.of(self.layout, GuestOffer(*record.guest))
        machine = SourceMachine(hello, offer, push=record.push, give_up_seconds=self._give_up_after)
        identity = (record.version, record.migration_id, record.token)
        take_up(machine, SourceInterpreter.now(), *identity, held=record.held)
        when = machine.timeline
        when.started, when.stopped, when.run_sent = record.started, record.stopped, record.run_sent
        when.stopped_at = record.stopped_at
        self._current = self._interpreter(machine, where, record.rate, tls)
        self._current.take_up(record)
        return await self._drive(self._current)

    def _interpreter(
        self, machine: SourceMachine, where: Endpoint, rate: int | None, tls: Credentials | None
    ) -> SourceInterpreter:
        known = (machine, where, self.layout, self.mappings, self._guest)
        made = SourceInterpreter(*known, poll_max_ns=self._poll_max_ns, rate=rate, tls=tls, keeping=self.keeping)
        self.begun(made)
        return made

    async def _drive(self, current: SourceInterpreter) -> Report:
        self._running = asyncio.create_task(current.run())
        finish = await asyncio.shield(self._running)
        if current.unmade is not None:
            raise current.unmade  # nothing has ended: another agent may go on
        self.finish = finish
        if finish.state is not State.COMPLETED:
            raise error_of(finish)
        machine = current.machine
        self.report = completed(machine.report, machine.timeline, current.stats, machine.reconnects)
        return self.report

    def check_free(self) -> None:
        """Raise UsageError unless the guest is here and on no journey."""
        if self.busy:
            raise UsageError("a migration is running already")
        if self.owner is not Owner.SOURCE:
            raise UsageError("the guest is not here any more")

    def _offer(self, where: Address) -> LayoutOffer:
        """Build the offer: on this host the memory itself goes, beyond it its pages. UsageError where it cannot."""
        data = [mapping.allocated for mapping in self.mappings]
        guest = GuestOffer(self._guest.kind, self._guest.vcpus)
        if not isinstance(where, UnixAddress):
            return LayoutOffer.of(self.layout, guest, data)
        try:
            seal_files(self.layout.regions, [mapping.fd for mapping in self.mappings])
        except UsageError as error:
            raise UsageError(
                f"{error}: send its pages to a destination that listens on tcp:127.0.0.1:PORT instead"
            ) from error
        return LayoutOffer.of(self.layout, guest, data, HANDED_OVER)

    def resume(self, address: Address | str | None = None) -> None:
        """Have a paused migration go on, at another address of the same destination if one is given. UsageError.

        Where nobody answers there the former one is tried as well, in turn.
        """
        by_hand.resume(self._current)
        if self._current is not None and address is not None:
            self._current.move_to(parse_address(address) if isinstance(address, str) else address)

    async def handled(self) -> None:
        """Return when the latest migration knows what was wished for."""
        if self._current is not None:
            await self._current.handled()

    @property
    def encrypted(self) -> bool:
        """Whether the latest migration is."""
        return self._current is not None and self._current.encrypted

    @property
    def busy(self) -> bool:
        """Whether a migration is running."""
        return self._running is not None and not self._running.done()

    @property
    def owner(self) -> Owner:
        """Who may run the guest, as far as the source can know."""
        return OWNERS[self.state]

    @property
    def downtime(self) -> float:
        """Seconds for which the guest stood still in the latest migration, 0.0 before it runs on."""
        return 0.0 if self._current is None else self._current.machine.timeline.downtime

    @property
    def duration(self) -> float:
        """Seconds that the latest migration took until its last page was placed, 0.0 before."""
        return 0.0 if self._current is None else self._current.machine.timeline.total

    @property
    def placed_pages(self) -> int:
        """Pages that the destination has told of."""
        return 0 if self._current is None else self._current.machine.placed_pages

    @property
    def latencies(self) -> tuple[float, Latencies] | None:
        """How long faults and vCPUs have waited at the destination, and when it told; None: it has not, or never does.

        The time is CLOCK_MONOTONIC here, in seconds.
        """
        machine = None if self._current is None else self._current.machine
        return None if machine is None or machine.latencies_at is None else (machine.latencies_at, machine.latencies)

    def snapshot(self) -> SourceStats | None:
        """Return the counters of the latest migration's pump, None where there was none."""
        return None if self._current is None else self._current.snapshot()

    def residency(self, cells: int) -> list[float]:
        """Return which part of each of `cells` equal pieces of the guest's memory has left, 0 to 1.

        Nothing has before the switchover, and all of it where it was handed over. [] while a migration is paused, for
        what was under way may have been lost, and once it is lost itself.
        """
        return [0.0] * cells if self._current is None else self._current.residency(cells)

    async def start_push(self) -> None:
        """Have the running migration push although it was started without; it begins when the guest has left."""
        if self._current is not None:
            self._current.ask_push()

    def set_rate(self, rate: int | None) -> None:
        """Limit the push of the running migration to `rate` bytes a second, 0 or None: not at all."""
        if self._current is not None:
            self._current.set_rate(rate)


def error_of(finish: Finish) -> PostcopyError:
    """Return the error that says how a migration ended, and who owns the guest."""
    error: PostcopyError
    match finish.exit_status:
        case 3:
            error = HostError(finish.text)
        case 6:
            error = MigrationLost(finish.text)
        case 7:
            error = MigrationCancelled(finish.text)
        case _:
            error = MigrationFailed(finish.text)
    return error
