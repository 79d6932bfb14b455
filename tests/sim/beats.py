"""Heartbeats on the data connections of either pump, as postcopy/pump/beat.h has them."""

from postcopy.limits import BEAT_SECONDS, QUIET_TICKS
from postcopy.wire import frame
from postcopy.wire.frame import FrameType, Header

BEAT = frame.pack(Header(FrameType.BEAT, 0, 0, 0))


class Line:
    """One data connection of a pump: its End, what came and went since the last tick."""

    def __init__(self, role, end):
        self.role = role
        self.end = end
        self.sent = self.received = 0  # bytes
        self.over = False
        self._sent_before = self._received_before = 0
        self._quiet = 0

    def send(self, data):
        self.sent += len(data)
        self.end.send(data)

    def tick(self):
        """Send a beat where one is due; True where nothing was heard for too long."""
        if self.sent == self._sent_before:
            self.send(BEAT)
        self._quiet = self._quiet + 1 if self.received == self._received_before else 0
        self._sent_before, self._received_before = self.sent, self.received
        return self._quiet >= QUIET_TICKS


class Beating:
    """A pump's lines. Subclasses call _break() for whatever ends one; `woke` tells the owner, in its time."""

    def __init__(self, host, beats):
        self.host = host
        self.world = host.world
        self.beats = beats
        self.lines = {}
        self.watching = False
        self.broken = None  # why
        self.woke = lambda: None
        self._ticking = 0  # counts the sets of lines

    def attach(self, role, end):
        self.lines[role] = Line(role, end)

    def watch(self):
        self.watching = True

    def _begin_lines(self):
        """Read what comes from now on."""
        self.broken = None
        self._ticking += 1
        if self.beats:
            self.host.timer(BEAT_SECONDS, self._tick, self._ticking)
        for line in list(self.lines.values()):
            taken = self._taken_by(line)
            line.end.listen(taken, lambda why, _broken, line=line: self._break(line, why))

    def _taken_by(self, line):
        """Return what takes the bytes of a line."""
        raise NotImplementedError

    def _tick(self, ticking):
        if ticking != self._ticking:
            return
        for line in self.lines.values():
            if not line.over and line.tick() and self.watching:
                self._break(line, "nothing was heard any more")
        self.host.timer(BEAT_SECONDS, self._tick, ticking)

    def _break(self, line, why):
        """Use a line no more and want new connections; only the first reason is told."""
        line.over = True
        if self.broken is None:
            self.broken = f"{line.role}: {why}"
            self._tell_owner()

    def _tell_owner(self):
        self.host.after(0.0003 * self.world.chance(), self.woke)

    def _end_lines(self):
        self._ticking += 1
        for line in self.lines.values():
            line.end.close()
        self.lines.clear()
