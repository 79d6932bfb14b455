"""Deliberate faults of the data: which page is whose, which comes next, how it is said, and how a pump places it."""

from postcopy.pages import Bitmap, Ledger, PageState
from postcopy.plan.push import PushPlan
from postcopy.wire import frame
from postcopy.wire.control import ControlDecoder

from .deliberate import Faults
from .destination_pump import DestinationPump, Receiver

FAULTS = Faults()
fault = FAULTS.fault


# --- pages ------------------------------------------------------------------------------------------------


@fault("claim-dropped", "claims-held")
def _(patch):
    """A page that somebody is writing already may be claimed once more."""
    claim = Ledger.claim
    patch(Ledger, "claim", lambda self, page: claim(self, page) or self[page] is PageState.WATCHED)


@fault("late-push-not-dropped", "placed-once")
def _(patch):
    """A copy that comes second is written over the guest's page."""
    claim = Ledger.claim

    def careless(self, page):
        won = claim(self, page)
        if not won and self[page] is PageState.PLACED:
            self._states[page] = PageState.PLACING
            return True
        return won

    patch(Ledger, "claim", careless)


@fault("claim-not-given-up", "claims-held")
def _(patch):
    """What came of a page in part is forgotten, and its claim is kept."""
    patch(Ledger, "release", lambda _self, _page: True)


@fault("zero-without-waking", "asked")
def _(patch):
    """A page that somebody waits for is noted as zeros, and nobody is woken."""

    def careless(self, page):
        if self[page] in {PageState.ABSENT, PageState.REQUESTED}:
            self._states[page] = PageState.ZERO
            return True
        return False

    patch(Ledger, "zero", careless)


@fault("balloon-forgotten", "right-bytes")
def _(patch):
    """A page that the guest gives back is fetched all the same."""
    patch(Ledger, "discard", lambda _self, _page: False)


@fault("bitmap-off-by-one", "told")
def _(patch):
    """The bits of what is here are one page off."""
    of_states = Bitmap.of_states.__func__

    def shifted(cls, states, *wanted):
        return of_states(cls, bytes(states)[-1:] + bytes(states)[:-1], *wanted)

    patch(Bitmap, "of_states", classmethod(shifted))


@fault("have-too-long", "told")
def _(patch):
    """Each run of pages that are here is told one page longer."""
    to_bytes = Bitmap.to_bytes

    def longer(self):
        grown = Bitmap(self.length)
        for begin, stop in self.runs():
            for page in range(begin, min(stop + 1, self.length)):
                grown.set(page)
        return to_bytes(grown)

    patch(Bitmap, "to_bytes", longer)


# --- plan -------------------------------------------------------------------------------------------------


@fault("plan-forgets-a-page", "push-whole")
def _(patch):
    """The page before a demanded one falls out of the plan."""
    following = PushPlan._next_back

    def forgetful(self, demand):
        extent = following(self, demand)
        return following(self, demand) if extent is not None else None

    patch(PushPlan, "_next_back", forgetful)


@fault("plan-drops-the-last-extent", "push-whole")
def _(patch):
    """The last extent of the data is never returned."""
    following = PushPlan.next

    def short(self, room):
        extents = following(self, room)
        return extents[:-1] if extents and self.done else extents

    patch(PushPlan, "next", short)


@fault("zero-extent-too-long", "right-bytes")
def _(patch):
    """A hole is one page longer than it is."""
    following = PushPlan._next_hole

    def longer(self):
        extent = following(self)
        if extent is None:
            return None
        region = self._layout.regions[extent.region]
        length = min(extent.length + region.page_size, region.size - extent.offset)
        return extent._replace(length=length)

    patch(PushPlan, "_next_hole", longer)


# --- wire -------------------------------------------------------------------------------------------------


@fault("decoder-loses-a-byte", "completes")
def _(patch):
    """A message that comes in two pieces loses a byte where it was cut."""
    following = ControlDecoder._next_payload

    def careless(self):
        payload = following(self)
        if payload is None and len(self._buffer) > 4:
            del self._buffer[-1:]
        return payload

    patch(ControlDecoder, "_next_payload", careless)


@fault("frame-offset-off-by-one-page", "right-bytes")
def _(patch):
    """A header is packed with the offset of the page behind."""
    pack = frame.pack

    def shifted(header):
        moved = header.type == frame.FrameType.PAGES and header.offset >= header.length
        return pack(header._replace(offset=header.offset - header.length) if moved else header)

    patch(frame, "pack", shifted)


# --- the pump, as it is modelled --------------------------------------------------------------------------


@fault("resume-forgets-faults", "asked")
def _(patch):
    """What faults wait for is not asked for again."""

    def forgetful(self):
        self.alone = False
        self._begin()

    patch(DestinationPump, "resume", forgetful)


@fault("wake-before-place", "woken-right")
def _(patch):
    """A page is shown to the guest as soon as its first bytes are there."""
    begin_run = Receiver._begin_run

    def early(self):
        begin_run(self)
        for key in self.run:
            self.pump.memory.write_behind(key, 0, b"")
            self.pump.memory._present(key)

    patch(Receiver, "_begin_run", early)


@fault("given-back-page-placed", "right-bytes")
def _(patch):
    """A page that the guest gave back while it was on its way is placed."""

    def careless(self, key, content):
        if content is None:
            self.pump.memory.write_behind(key, 0, b"")
            self.pump.memory.continue_(key)
        else:
            self.pump.memory.copy(key, content)
        self.pump.placed(key)

    patch(Receiver, "_place_one", careless)


@fault("old-connections-go-on", "claims-held")
def _(patch):
    """Whoever leaves connections behind still takes what comes over them."""

    def forgetful(self):
        self._ticking += 1
        self.lines = {}
        self.receivers = {}
        self.alone = True
        self.requested.clear()
        self.moved = True

    patch(DestinationPump, "detach", forgetful)
