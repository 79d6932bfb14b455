"""The control messages: what agents say to each other, as values.

What enters and leaves: the fields of each message, typed; the limits of each type are in fields.py. Who may
say what when is drawn in README.md. In the bytes, a message is a map of its fields and of "t", its name in
MESSAGES.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from postcopy.errors import ProtocolError, UsageError
from postcopy.limits import (
    CONTROL_BYTES_MAX,
    HAVE_BYTES_MAX,
    HAVE_PAGES_MAX,
    PAGE_SIZE_MAX,
    PAGE_SIZE_MIN,
    REGIONS_MAX,
    VCPUS_MAX,
)
from postcopy.pages.regions import Layout, Region
from postcopy.wire.fields import (
    Count,
    Counts,
    Instant,
    LineText,
    MigrationId,
    NameText,
    Octets,
    OneOf,
    ReportMap,
    Token,
    Version,
    Versions,
    Whole,
)
from postcopy.wire.latencies import NOTHING, Latencies
from postcopy.wire.records import Record, Records, Since
from postcopy.wire.version import HANDED_OVER_SINCE, LATENCIES_SINCE

# Why an agent refuses, in one word for programs; the text beside it is for people.
REFUSE_CODES = (
    *("version", "layout", "host", "busy", "memory", "guest", "protocol", "internal"),
    *("unknown", "paused", "unrun", "lost"),
)

# Of these, what answers RESUME: there is no such migration here; somebody holds it here; RUN never came here and the
# guest never ran; what the other side needs is gone for good.
UNKNOWN, HELD, UNRUN, GONE = REFUSE_CODES[-4:]

# What PROBED answers: a migration would be let in, or the code of the REFUSE that it would meet.
READY = "ready"
PROBE_ANSWERS = (READY, *REFUSE_CODES)

# Bytes of data in each region; empty: not known.
DataCounts = Annotated[tuple[int, ...], Counts(REGIONS_MAX)]

# How the memory gets there: its pages are sent, or its files handed to a process on the same host.
SENT = "sent"
HANDED_OVER = "handed-over"
MemoryWay = Annotated[str, OneOf((SENT, HANDED_OVER)), Since(HANDED_OVER_SINCE)]

# How long faults and vCPUs have waited at the destination so far.
Waits = Annotated[Latencies, Record(Latencies), Since(LATENCIES_SINCE)]

# Which pages a destination that fetches wants.
ALL = "all"
ASKED_FOR = "asked-for"

# What the other fields of STATE take is less than this.
_STATE_REST = 1024


@dataclass(frozen=True, slots=True)
class Hello:
    """Source to destination, first: the versions it speaks (lowest, highest) and what it is."""

    versions: Versions
    software: NameText


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a snapshot's file that a destination wants as a region with pages of that size. In bytes."""

    offset: Annotated[int, Whole(0, (1 << 63) - 1)]
    size: Annotated[int, Whole(PAGE_SIZE_MIN, (1 << 63) - 1)]
    page_size: Annotated[int, Whole(PAGE_SIZE_MIN, PAGE_SIZE_MAX)]


@dataclass(frozen=True, slots=True)
class Welcome:
    """Destination to source: the version agreed on, and what data connections have to present.

    A destination that fetches says which `pieces` it wants, and whether ALL of their pages or those ASKED_FOR. Since
    version 3.
    """

    version: Version
    migration_id: MigrationId
    token: Token = field(repr=False)  # a secret: never in a log
    software: NameText
    pieces: Annotated[tuple[Piece, ...], Records(Record(Piece), REGIONS_MAX, 0), Since(3)] = ()
    pages: Annotated[str, OneOf((ALL, ASKED_FOR)), Since(3)] = ALL


@dataclass(frozen=True, slots=True)
class Refuse:
    """Either way: this cannot be, and why. The sender closes behind it."""

    code: Annotated[str, OneOf(REFUSE_CODES)]
    text: LineText


@dataclass(frozen=True, slots=True)
class RegionOffer:
    """One region of a LAYOUT_OFFER; its index is its place in the array. Sizes in bytes."""

    type: NameText
    page_size: Annotated[int, Whole(PAGE_SIZE_MIN, PAGE_SIZE_MAX)]
    size: Annotated[int, Whole(PAGE_SIZE_MIN, (1 << 63) - 1)]


@dataclass(frozen=True, slots=True)
class GuestOffer:
    """What kind of guest comes, and with how many vCPUs."""

    kind: NameText
    vcpus: Annotated[int, Whole(1, VCPUS_MAX)]


@dataclass(frozen=True, slots=True)
class LayoutOffer:
    """Source to destination: the memory and the guest to make room for.

    `data` says how many bytes of each region hold data now, the rest being holes; empty: that is not known, it may be
    all of it. `memory` is SENT, or HANDED_OVER: the regions' files follow on a memory connection.
    Since version 3.
    """

    regions: Annotated[tuple[RegionOffer, ...], Records(Record(RegionOffer), REGIONS_MAX)]
    guest: Annotated[GuestOffer, Record(GuestOffer)]
    data: DataCounts = ()
    memory: MemoryWay = SENT

    @classmethod
    def of(cls, layout: Layout, guest: GuestOffer, data: Sequence[int] = (), memory: str = SENT) -> LayoutOffer:
        """Return the offer of this layout."""
        regions = (RegionOffer(region.type, region.page_size, region.size) for region in layout.regions)
        return cls(tuple(regions), guest, tuple(data), memory)

    @property
    def handed_over(self) -> bool:
        """Whether no page is sent."""
        return self.memory == HANDED_OVER

    def data_of(self, region: int) -> int:
        """Return how many bytes of a region are to be expected."""
        size = self.regions[region].size
        return min(size, self.data[region]) if self.data else size

    def layout(self) -> Layout:
        """Return the layout that is offered; ProtocolError where its numbers make no sense together."""
        if len(self.data) not in {0, len(self.regions)}:
            raise ProtocolError(f"message layout_offer: data of {len(self.data)} regions out of {len(self.regions)}")
        try:
            return Layout(
                tuple(
                    Region(index, region.type, region.page_size, region.size)
                    for index, region in enumerate(self.regions)
                )
            )
        except UsageError as error:
            raise ProtocolError(f"message layout_offer: {error}") from None


@dataclass(frozen=True, slots=True)
class Ready:
    """Destination to source: everything that can fail was checked; the guest may be stopped."""


@dataclass(frozen=True, slots=True)
class State:
    """Source to destination, with the guest stopped: its device state, which only its kind of guest reads.

    `stopped_at` is the source's monotonic clock in seconds. It says something to a destination on the same
    boot of the same machine only, which `boot_id` tells.
    """

    guest: Annotated[bytes, Octets(0, CONTROL_BYTES_MAX - _STATE_REST)] = field(repr=False)
    stopped_at: Instant
    boot_id: NameText


@dataclass(frozen=True, slots=True)
class Loaded:
    """Destination to source: the state is restored, the vCPUs are ready and do not run."""


@dataclass(frozen=True, slots=True)
class Run:
    """Source to destination: the right to run the guest passes with the sending of this message."""


@dataclass(frozen=True, slots=True)
class Running:
    """Destination to source: the guest runs, since this many seconds on the destination's monotonic clock."""

    first_instruction_at: Instant


@dataclass(frozen=True, slots=True)
class Progress:
    """Destination to source, about twice a second while pages travel: what was placed, what faults met.

    `latencies` are those up to now. Since version 3.
    """

    placed_pages: Count
    total_pages: Count
    faults: Count
    latencies: Waits = NOTHING


@dataclass(frozen=True, slots=True)
class AllPlaced:
    """Destination to source: the content of every page is here, and the destination's part of the report.

    `latencies` have the faults that the report sums up, as a last Progress would. Since version 3.
    """

    report: ReportMap
    latencies: Waits = NOTHING


@dataclass(frozen=True, slots=True)
class Released:
    """Source to destination: it has let go of the guest's memory. The last message."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Either way before RUN: stop here. The source keeps the guest, and the sender closes behind it."""

    text: LineText


@dataclass(frozen=True, slots=True)
class Resume:
    """Source to destination, first on a new control connection: go on with a migration whose connections ended.

    The id and token are those of its first WELCOME. It says as well that RUN was sent.
    """

    migration_id: MigrationId
    token: Token = field(repr=False)


@dataclass(frozen=True, slots=True)
class Have:
    """Destination to source, after RESUME: which of `pages` pages from page `first` on it needs no more.

    `bits` is a bitmap of them, compressed: residence.py makes and reads it.
    """

    region: Annotated[int, Whole(0, REGIONS_MAX - 1)]
    first: Count
    pages: Annotated[int, Whole(1, HAVE_PAGES_MAX)]
    bits: Annotated[bytes, Octets(1, HAVE_BYTES_MAX)] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Alive:
    """Source to destination, about twice a second after RUN: it is there. PROGRESS says so the other way."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Source to destination, in place of LAYOUT_OFFER: it asks what would come of a migration of this."""

    regions: Annotated[tuple[RegionOffer, ...], Records(Record(RegionOffer), REGIONS_MAX)]
    guest: Annotated[GuestOffer, Record(GuestOffer)]
    data: DataCounts = ()

    @property
    def offer(self) -> LayoutOffer:
        """The offer that a migration would make."""
        return LayoutOffer(self.regions, self.guest, self.data)


@dataclass(frozen=True, slots=True)
class Probed:
    """Destination to source, answering PROBE: what LAYOUT_OFFER would be answered, and what the host is like.

    `answer` is `ready` or the code of a REFUSE, `text` that refusal's; `mode` is how it would place pages.
    Nothing of what was tried is left.
    """

    answer: Annotated[str, OneOf(PROBE_ANSWERS)]
    text: LineText
    mode: NameText
    host: ReportMap


Message = (
    Hello
    | Welcome
    | Refuse
    | LayoutOffer
    | Ready
    | State
    | Loaded
    | Run
    | Running
    | Progress
    | AllPlaced
    | Released
    | Cancel
    | Resume
    | Have
    | Alive
    | Probe
    | Probed
)

MESSAGES: dict[str, type[Message]] = {
    "hello": Hello,
    "welcome": Welcome,
    "refuse": Refuse,
    "layout_offer": LayoutOffer,
    "ready": Ready,
    "state": State,
    "loaded": Loaded,
    "run": Run,
    "running": Running,
    "progress": Progress,
    "all_placed": AllPlaced,
    "released": Released,
    "cancel": Cancel,
    "resume": Resume,
    "have": Have,
    "alive": Alive,
    "probe": Probe,
    "probed": Probed,
}

# Messages that were not there from the first version on.
SINCE: dict[str, int] = {"progress": 2, "probe": 2, "probed": 2, "resume": 3, "have": 3, "alive": 3}
