"""The destination's pump as a model: faults become requests, bytes of both connections become placed pages.

It follows demand.c, receive.c, recover.c and removal.c of the real one in the order of what they do, and takes every
decision about a page from `postcopy.pages.Ledger`, against which the real one's page map is tested. What arrives is
judged by `postcopy.wire.frame`. A step of a receiver is whole; claims outlive it where content comes in pieces,
straight into the file (`alias`), or where the kernel's page tables are changing.
"""

from postcopy.pages import Action, Ledger, PageState
from postcopy.wire import frame
from postcopy.wire.frame import HEADER_BYTES, Direction, FrameRefusal, FrameType, Header

from .beats import Beating
from .world import RuleBrokenError

LOOK_SECONDS = 0.0005
SETTLED = (PageState.PLACED, PageState.ZERO)


class DestinationPump(Beating):
    """`alias`: content arrives where it belongs, else in a staging buffer. `requested` are pages asked for."""

    def __init__(self, host, layout, memory, *, alias, beats):
        super().__init__(host, beats)
        self.layout = layout
        self.memory = memory
        self.alias = alias
        self.ledgers = [Ledger(region.pages) for region in layout.regions]
        self.receivers = {}
        self.state = "idle"
        self.alone = False
        self.pending = {}  # (vCPU, page): faults that are accounted for
        self.requested = set()
        self.faults = 0
        self.resident = 0
        self.total = layout.pages
        self.received_bytes = 0
        self.moved = True  # since the rules were looked at
        self._looking = False

    # --- life ---------------------------------------------------------------------------------------------

    def start(self):
        self.state = "running"
        self.memory.on_message = self._look_soon
        self._begin()

    def resume(self):
        self.alone = False
        self._begin()
        for _, key in list(self.pending):
            if self.ledgers[key[0]][key[1]] is PageState.REQUESTED and key not in self.requested:
                self._request(key)

    def _begin(self):
        self.requested.clear()
        self.receivers = {role: Receiver(self, line) for role, line in self.lines.items()}
        self._begin_lines()

    def _taken_by(self, line):
        return self.receivers[line.role].take

    def detach(self):
        """Leave the connections: nothing half is left, the guest is served with what is here."""
        for receiver in self.receivers.values():
            receiver.abandon()
        self.receivers = {}
        self._end_lines()
        self.alone = True
        self.requested.clear()
        self.moved = True

    def stop(self):
        self._end_lines()
        if self.state == "running":
            self.state = "idle"
        self.memory.on_message = None

    def _break(self, line, why):
        self.alone = self.alone or line.role == "urgent"
        super()._break(line, why)

    def page_map(self, region):
        """Return one byte a page, as the real one's is."""
        return memoryview(self.ledgers[region].to_bytes())

    # --- faults -------------------------------------------------------------------------------------------

    def _look_soon(self):
        if not self._looking:
            self._looking = True
            self.host.after(LOOK_SECONDS * self.world.chance(), self._look)

    def _look(self):
        self._looking = False
        if self.memory.on_message is not None:
            self.read_messages()

    def read_messages(self):
        """Take all that the userfaultfd tells: what the guest gives back first, since it goes on then."""
        memory = self.memory
        faults = []
        while memory.messages:
            kind, key, vcpu = memory.messages.popleft()
            if kind == "remove":
                self._discard(key)
                memory.removal_read(key)
            else:
                faults.append((vcpu, key))
        for vcpu, key in faults:
            if (vcpu, key) not in self.pending:
                self.faults += 1
                self.pending[vcpu, key] = True
            self._serve(key)
        self._settle()

    def _serve(self, key):
        self.moved = True
        region, page = key
        match self.ledgers[region].fault(page):
            case Action.REQUEST:
                self._request(key)
            case Action.PLACE_ZERO:
                self.memory.zero(key)
                self.ledgers[region].place(page)
            case Action.WAKE:
                self._resolve_placed(key)
            case Action.POISON:
                self.memory.poison([key])

    def _resolve_placed(self, key):
        if key in self.memory.mapped:
            self.memory.wake(key)
        elif key in self.memory.file:
            self.memory.map_again(key)
        else:  # given back since it was placed
            self.memory.zero(key)

    def _request(self, key):
        if self.alone or "urgent" not in self.lines:
            return  # asked for when there is a connection
        region = self.layout.regions[key[0]]
        self.requested.add(key)
        header = Header(FrameType.REQUEST, key[0], key[1] * region.page_size, region.page_size)
        self.lines["urgent"].send(frame.pack(header))

    def _settle(self):
        """Forget the faults whose page is here or lost."""
        over = (PageState.PLACED, PageState.POISONED)
        done = [fault for fault in self.pending if self.ledgers[fault[1][0]][fault[1][1]] in over]
        for fault in done:
            del self.pending[fault]

    # --- pages --------------------------------------------------------------------------------------------

    def placed(self, key):
        """Account for a page that its owner has made present."""
        if self.ledgers[key[0]].place(key[1]):
            self._settle()
        self.add_resident()

    def add_resident(self):
        self.moved = True
        self.resident += 1
        if self.resident == self.total and self.state == "running":
            self.state = "complete"
            self._tell_owner()

    def _discard(self, keys):
        self.moved = True
        for key in keys:
            if self.ledgers[key[0]].discard(key[1]):
                self.memory.wake(key)
                self.add_resident()

    def check_complete(self):
        """Miss nothing after END: a page that is absent was never sent and never will be."""
        for region, ledger in zip(self.layout.regions, self.ledgers, strict=True):
            if ledger.count(PageState.ABSENT):
                page = ledger.to_bytes().index(PageState.ABSENT)
                raise RuleBrokenError("push-whole", f"END came, and page {(region.index, page)} was never sent")

    def poison(self):
        """Give up what is not here."""
        lost = []
        for region, ledger in enumerate(self.ledgers):
            lost += [(region, page) for page in range(ledger.pages) if ledger.poison(page)]
        self.memory.poison(lost)
        self._settle()
        self.moved = True

    def claims(self):
        """Return how many pages are claimed by somebody who is placing them."""
        return sum(receiver.claims() for receiver in self.receivers.values())


class Receiver:
    """Bytes of one connection become pages. `placing`: claimed, content whole, not placed yet."""

    def __init__(self, pump, line):
        self.pump = pump
        self.line = line
        self.direction = Direction.URGENT if line.role == "urgent" else Direction.PUSH
        self.buffer = bytearray()
        self.header = None
        self.taken = 0  # bytes of the payload, with an alias
        self.run = []  # claimed pages that the alias is filled for; none: the page is dropped
        self.run_end = 0
        self.placing = []
        self.ended = False

    def take(self, data):
        """Use bytes as they come."""
        self.line.received += len(data)
        self.pump.received_bytes += len(data)
        self.buffer += data
        self._step()

    def _step(self):
        while not self.line.over and self._place() and self._use():
            pass

    def _use(self):
        """Take one step with the bytes at hand; False: more are needed."""
        if self.header is None:
            if len(self.buffer) < HEADER_BYTES:
                return False
            header = frame.unpack(bytes(self.buffer[:HEADER_BYTES]))
            del self.buffer[:HEADER_BYTES]
            reason = frame.refusal(header, self.pump.layout, self.direction)
            if reason is not FrameRefusal.OK or (self.ended and header.type != FrameType.BEAT):
                raise RuleBrokenError("no-breach", f"{self.line.role}: {frame.explain(reason, header)}")
            return self._begin(header)
        return self._use_alias() if self.pump.alias else self._use_staged()

    def _begin(self, header):
        if header.type == FrameType.END:
            self.ended = True
            self.pump.check_complete()
        elif header.type == FrameType.ZERO:
            self._take_zero(header)
        elif header.type == FrameType.PAGES:
            self.header = header
            self.taken = 0
            if self.pump.alias:
                self._begin_run()
        return True

    def _pages(self, header):
        size = self.pump.layout.regions[header.region].page_size
        return range(header.offset // size, (header.offset + header.length) // size)

    def _take_zero(self, header):
        pump = self.pump
        ledger = pump.ledgers[header.region]
        pump.moved = True
        for page in self._pages(header):
            if not ledger.zero(page):
                continue
            key = (header.region, page)
            pump.memory.known_as_zero(key)
            if ledger[page] is PageState.ZERO:
                pump.add_resident()
            else:  # somebody waits
                pump.memory.zero(key)
                pump.placed(key)

    def _use_staged(self):
        header, pump = self.header, self.pump
        if len(self.buffer) < header.length:
            return False
        ledger, size = pump.ledgers[header.region], pump.layout.regions[header.region].page_size
        for number, page in enumerate(self._pages(header)):
            if ledger.claim(page):
                content = bytes(self.buffer[number * size : number * size + size])
                self.placing.append(((header.region, page), content))
        pump.moved = True
        del self.buffer[: header.length]
        self.header = None
        return True

    # --- straight into the file ---------------------------------------------------------------------------

    def _begin_run(self):
        """Claim as many pages as have arrived and the one that comes next; where that is not to be had, drop it."""
        header, pump = self.header, self.pump
        size, ledger = pump.layout.regions[header.region].page_size, pump.ledgers[header.region]
        page = (header.offset + self.taken) // size
        self.run, bytes_claimed = [], 0
        while self.taken + bytes_claimed < header.length and (not self.run or bytes_claimed + size <= len(self.buffer)):
            if not ledger.claim(page):
                break
            self.run.append((header.region, page))
            bytes_claimed += size
            page += 1
        pump.moved = True
        self.run_end = self.taken + (bytes_claimed or size)

    def _use_alias(self):
        header, pump = self.header, self.pump
        size = pump.layout.regions[header.region].page_size
        while self.buffer and self.taken < self.run_end:
            key, offset = divmod(header.offset + self.taken, size)
            part = bytes(self.buffer[: min(size - offset, self.run_end - self.taken)])
            del self.buffer[: len(part)]
            if self.run:
                pump.memory.write_behind((header.region, key), offset, part)
            self.taken += len(part)
        if self.taken < self.run_end:
            return False
        self.placing += [(key, None) for key in self.run]
        self.run = []
        if self.taken == header.length:
            self.header = None
        else:
            self._begin_run()
        return True

    # --- placing ------------------------------------------------------------------------------------------

    def _place(self):
        """Place what is claimed and whole; False: the page tables are changing, it is tried again."""
        pump = self.pump
        while self.placing:
            if pump.memory.unread_removals:
                if self.line.role == "push":
                    pump.host.after(LOOK_SECONDS * pump.world.chance(), self._step)
                    return False
                pump.read_messages()
            self._place_one(*self.placing.pop(0))
        return True

    def _place_one(self, key, content):
        pump = self.pump
        ledger = pump.ledgers[key[0]]
        if ledger[key[1]] is PageState.DROPPED:
            self._finish_dropped(key)
        elif content is None:
            pump.memory.continue_(key)
            pump.placed(key)
        else:
            pump.memory.copy(key, content)
            pump.placed(key)

    def _finish_dropped(self, key):
        """The guest gave it back meanwhile: it is zeros, and what came of it is nobody's."""
        pump = self.pump
        pump.memory.forget(key)
        pump.ledgers[key[0]].drop(key[1])
        pump.memory.wake(key)
        pump.add_resident()

    def abandon(self):
        """Leave nothing half: place what is whole, give up the claims of what came in part."""
        if self.placing and self.pump.memory.unread_removals:
            self.pump.read_messages()
        while self.placing:
            self._place_one(*self.placing.pop(0))
        for key in self.run:
            self.pump.memory.forget(key)
            if not self.pump.ledgers[key[0]].release(key[1]):
                self._finish_dropped(key)
        self.run = []

    def claims(self):
        return len(self.placing) + len(self.run)
