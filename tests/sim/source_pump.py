"""The source's pump as a model: requests are answered, what the plan says is pushed, each page once.

It follows answer.c and order.c of the real one, and link's Push: `postcopy.plan.PushPlan` gives the order, told of data
and holes by link's own `survey`. Requests are judged by `postcopy.wire.frame`.
"""

import threading

from postcopy.link.push import survey
from postcopy.plan import PushPlan
from postcopy.wire import frame
from postcopy.wire.frame import HEADER_BYTES, Direction, FrameRefusal, FrameType, Header

from .beats import Beating
from .world import RuleBrokenError

UNSENT, PUSHED, DEMANDED = range(3)
ORDERS_AHEAD = 3  # extents that were taken from the plan and not sent yet
NEVER = threading.Event()


class SourcePump(Beating):
    """`again_max`: pages up to so many bytes are sent on demand although the push has sent them."""

    def __init__(self, host, layout, memory, *, again_max, window, extent_bytes, beats):
        super().__init__(host, beats)
        self.layout = layout
        self.memory = memory
        self.again_max = again_max
        self.window = window  # bytes of the push that may be under way
        self.sent = [bytearray(region.pages) for region in layout.regions]
        self.guest_stopped = False
        self._extent_bytes = extent_bytes
        self._buffers = {"urgent": bytearray(), "push": bytearray()}
        self._plan = None
        self._orders = []
        self._ended = False
        self._running = False

    def start(self):
        self._running = True
        self._begin_lines()
        if self._plan is not None:
            self._push_soon()

    def stop(self):
        self._running = False
        self._plan = None
        self._end_lines()

    def skip(self, region, first, has):
        """Push none of these: the destination has them."""
        for begin, stop in has.runs():
            self.sent[region][first + begin : first + stop] = bytes([PUSHED]) * (stop - begin)

    def _content(self, key):
        """Read a page of the guest's memory, which must stand still."""
        if self.memory.guest.place is self.memory:
            raise RuleBrokenError("still", f"page {key} is read while the guest runs on it")
        if self.memory.released:
            raise RuleBrokenError("kept", f"page {key} is wanted, and the memory is released")
        return self.memory.pages[key]

    # --- requests -----------------------------------------------------------------------------------------

    def _taken_by(self, line):
        direction = Direction.TO_SOURCE if line.role == "urgent" else Direction.PUSH_TO_SOURCE
        buffer = self._buffers[line.role]

        def take(data):
            line.received += len(data)
            buffer.extend(data)
            while len(buffer) >= HEADER_BYTES and not line.over:
                header = frame.unpack(bytes(buffer[:HEADER_BYTES]))
                del buffer[:HEADER_BYTES]
                reason = frame.refusal(header, self.layout, direction)
                if reason is not FrameRefusal.OK:
                    raise RuleBrokenError("no-breach", f"{line.role}: {frame.explain(reason, header)}")
                if header.type == FrameType.REQUEST:
                    self._answer(header, line)

        return take

    def _answer(self, request, line):
        size = self.layout.regions[request.region].page_size
        page = request.offset // size
        before = self.sent[request.region][page]
        self.sent[request.region][page] = DEMANDED
        if self._plan is not None and self.world.chance() < 0.5:
            self._plan.demanded(request.region, request.offset)
        if before == DEMANDED or (before == PUSHED and size > self.again_max):
            return
        key = (request.region, page)
        content = self._content(key)
        self._send(line, request.region, page, page + 1, None if self._is_zero(key, content) else content)

    def _is_zero(self, key, content):
        return content == self.memory.guest.zero(key)

    def _send(self, line, region, first, stop, content):
        """Send a run of pages: their content, or none where they are zeros."""
        size = self.layout.regions[region].page_size
        kind = FrameType.ZERO if content is None else FrameType.PAGES
        line.send(frame.pack(Header(kind, region, first * size, (stop - first) * size)) + (content or b""))

    # --- the push -----------------------------------------------------------------------------------------

    def push(self):
        """Find out what there is to send, and begin as soon as it runs."""
        if self._plan is None:
            self._plan = PushPlan(self.layout, extent_bytes=self._extent_bytes)
            for region in self.layout.regions:
                survey(self._plan, self.memory.region(region.index), NEVER)
            self._orders = []
            if self._running:
                self._push_soon()

    def _push_soon(self):
        self.host.after(0.0005 * self.world.chance(), self._push_some, self._plan)

    def _push_some(self, plan):
        if plan is not self._plan or self.broken is not None:
            return
        line = self.lines["push"]
        while line.end.out.flying < self.window:
            if not self._orders:
                self._orders = plan.next(ORDERS_AHEAD)
            if not self._orders:
                if not self._ended:
                    line.send(frame.pack(Header(FrameType.END, 0, 0, 0)))
                self._plan, self._ended = None, True
                return
            self._push_extent(line, self._orders.pop(0))
            if self.world.chance() < 0.3:
                break
        self.host.after(self.world.between(0.0005, 0.004), self._push_some, plan)

    def _push_extent(self, line, extent):
        size, region = self.layout.regions[extent.region].page_size, extent.region
        first, stop = extent.offset // size, (extent.offset + extent.length) // size
        if extent.zero:
            self._send(line, region, first, stop, None)
            return
        begin, parts, kind = first, [], None
        for page in range(first, stop):
            following = None
            if self.sent[region][page] == UNSENT:
                self.sent[region][page] = PUSHED
                content = self._content((region, page))
                following = "zero" if self._is_zero((region, page), content) else "pages"
            if following != kind:
                self._send_run(line, region, begin, page, kind, parts)
                begin, parts, kind = page, [], following
            if kind == "pages":
                parts.append(content)
        self._send_run(line, region, begin, stop, kind, parts)

    def _send_run(self, line, region, begin, stop, kind, parts):
        if kind is not None and begin < stop:
            self._send(line, region, begin, stop, b"".join(parts) if kind == "pages" else None)
