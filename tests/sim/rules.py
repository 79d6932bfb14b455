"""What must hold whatever happens: the rules, each with a name, looked at where it could be broken and after each step.

| rule | what it says |
|---|---|
| one-owner | never do two sides run the guest or own it; who gave it away takes it back only where it never ran |
| run-once | Run is sent at most once in a migration, and the guest is started once, upon it |
| placed-once | no page's content is placed twice, and nothing is placed over a page that is there |
| right-bytes | what is placed, or taken for zeros, is what the source had at the switchover, or zeros once given back |
| woken-right | whatever a vCPU reads is what the guest wrote last |
| claims-held | each claimed page has somebody who is placing it |
| asked | each page that a fault waits for is accounted for, and asked for while there is a connection |
| told | what Have says is here is here |
| told-all | what is here when the connections are back is not pushed again |
| held | whoever was asked to pause has no page travel until he is asked to go on |
| acknowledged | AllPlaced is said, and faults are trapped no more, only when every page is here |
| kept | the source's memory is released only behind AllPlaced, and no page of it is wanted after that |
| still | the source's memory is read for the destination only while its guest stands still |
| proven | a data connection is attached only to the attempt that it was dialled for |
| push-whole | behind END no page is absent |
| patience | nobody takes the other side for dead before it had its time |
| noticed | a connection on which nothing comes any more is noticed within 3 s |
| no-mistake | no machine meets an event that its table does not know, and nothing raises what nobody expects |
| no-breach | two honest agents never break the protocol |
| completes | once the trouble stops the migration comes to its end, and to the right one |
| nobody-waits | at the end no vCPU waits, and every page holds what it has to |
"""

import re

from postcopy.link import by_hand
from postcopy.pages import PageState
from postcopy.session.events import PauseAsked, ResumeAsked
from postcopy.session.states import OWNERS, Owner, State
from postcopy.wire import residence
from postcopy.wire.messages import AllPlaced, Run

from .world import RuleBrokenError

RULES = set(re.findall(r"^\| ((?!rule)[a-z-]+) \|", __doc__, re.MULTILINE))
CLAIMED = (PageState.PLACING, PageState.WATCHED, PageState.DROPPED)
NOTICED_SECONDS = 3.0


class Rules:
    """Looks at both agents, which are set once they are made."""

    def __init__(self, world):
        self.world = world
        self.source = self.destination = None
        self.run_sent = 0
        self.started = False  # the guest, at the destination
        self.whole = False  # AllPlaced was said
        self._tokens = {}  # of the attempts at data connections
        self._placed = set()  # before the connections ended
        self._held = set()  # sides that somebody asked to pause
        self._kept = None  # the side whose successor has to know of that

    def loops(self):
        """Return the source's loop and the destination's, None where there is none."""
        return self.source.loop, self.destination.current

    def pump(self):
        """Return the pump that places pages, or None."""
        there = self.destination.current
        return None if there is None else there.pump

    def recovers(self, loop):
        """Say whether a side is one that notices silence at once."""
        return loop.machine.recoverable

    # --- where something happens --------------------------------------------------------------------------

    def new_migration(self):
        """Begin to count anew."""
        self.run_sent = 0
        self.started = self.whole = False
        self._placed = set()
        self._kept = None

    def sends(self, loop, message):
        """Look at a message before it is sent."""
        if isinstance(message, Run):
            self.run_sent += 1
            if self.run_sent > 1:
                raise RuleBrokenError("run-once", f"Run is sent {self.run_sent} times")
        elif isinstance(message, AllPlaced):
            self._complete(loop, "AllPlaced is said")
            self.whole = True

    def _complete(self, loop, what):
        if loop.pump is not None and not all(ledger.complete for ledger in loop.pump.ledgers):
            raise RuleBrokenError("acknowledged", f"{what}, and pages are not here")

    def settles(self, loop):
        """Look at the end of trapping."""
        self._complete(loop, "faults are trapped no more")

    def starts(self, loop):
        """Look at the start of the guest at the destination."""
        if not self.run_sent:
            raise RuleBrokenError("run-once", "the guest is started, and Run was never sent")
        if self.started:
            raise RuleBrokenError("run-once", "the guest is started a second time")
        if loop.agent.guest.place is not None:
            raise RuleBrokenError("one-owner", "the guest is started at the destination while it runs at the source")
        self.started = True

    def goes_back(self):
        """Look at a source that resumes its guest."""
        if self.started:
            raise RuleBrokenError("one-owner", "the source takes a guest back that has run at the destination")

    def discards(self, loop):
        """Look at a destination that throws everything away."""
        if loop.guest_here:
            raise RuleBrokenError("one-owner", "a guest that has run is thrown away")

    def releases(self):
        """Look at a source that gives its memory back."""
        if not self.whole:
            raise RuleBrokenError("kept", "the source lets go of memory, and AllPlaced was never said")

    def dials(self, attempt, token):
        """Take note of which token an attempt has."""
        self._tokens[attempt] = token

    def let_in(self, loop, end):
        """Look at a data connection that a side lets in."""
        if self._tokens[end.connection.attempt] != loop.machine.token:
            raise RuleBrokenError("proven", f"{end.connection.name} was dialled for another attempt")

    def told(self, _loop, have):
        """Hold what the destination says that it has against what it has."""
        pump = self.pump()
        if pump is None:
            return
        ledger = pump.ledgers[have.region]
        for begin, stop in residence.read(have).runs():
            for page in range(have.first + begin, have.first + stop):
                if ledger[page] not in {PageState.PLACED, PageState.ZERO}:
                    raise RuleBrokenError("told", f"Have names page {(have.region, page)}: it is {ledger[page].name}")

    def detached(self, pump):
        """Take note of what was placed when the destination let its data connections go."""
        self._placed = {
            (region, page)
            for region, ledger in enumerate(pump.ledgers)
            for page in range(ledger.pages)
            if ledger[page] is PageState.PLACED
        }

    def skipped(self, pump):
        """Look at what a source will push, once it has heard what the destination has."""
        for region, page in self._placed:
            if not pump.sent[region][page]:
                raise RuleBrokenError("told-all", f"page {(region, page)} is to be pushed, and was placed before")

    def asked(self, loop, act):
        """Take note of what somebody asked one side for."""
        if act is by_hand.pause:
            self._held.add(loop)
        else:
            self._held.discard(loop)
            self._kept = None if self._kept is loop else self._kept

    def handles(self, loop, event):
        """Expect nothing, from here on, of whoever takes the place of a side that is about to go on."""
        if isinstance(event, ResumeAsked) and self._kept is loop:
            self._kept = None

    def handled(self, loop, event):
        """Expect whoever takes a side's place to know of a pause that it has heard of, whatever it did about it."""
        if isinstance(event, PauseAsked) and loop in self._held and loop.machine.state in by_hand.PAUSED:
            self._kept = loop

    def takes_up(self, loop):
        """Expect of who takes a side's place what was expected of that one."""
        if self._kept is not None:
            self._held.add(loop)
            self._kept = loop

    def mute(self, end):
        """Look whether it is noticed that nothing comes to this end any more."""
        for loop in self.loops():
            if self._relies(loop, end):
                self.world.after(NOTICED_SECONDS, self._noticed, loop, end, loop.host.life, self.world.now)

    def _relies(self, loop, end):
        """Say whether a side takes this for a connection that works."""
        if loop is None or loop.finish is not None or loop.machine.step != "active" or not self.recovers(loop):
            return False
        lines = loop.pump.lines.values() if loop.pump is not None else ()
        return (loop.channel is not None and loop.channel.end is end) or any(line.end is end for line in lines)

    def _noticed(self, loop, end, life, since):
        undisturbed = loop.host.life == life and loop.host.frozen_until <= since
        if undisturbed and end.heard_at > since:  # what was under way
            later = end.heard_at + NOTICED_SECONDS - self.world.now
            self.world.after(later, self._noticed, loop, end, life, end.heard_at)
        elif undisturbed and self._relies(loop, end):
            text = f"the {loop.role} heard nothing on {end.connection.name} for 3 s and goes on with it"
            raise RuleBrokenError("noticed", text)

    # --- after each step ----------------------------------------------------------------------------------

    def look(self):
        """Look at all that can be broken by any step."""
        self._look_at_owners(*self.loops())
        self._look_at_held()
        pump = self.pump()
        if pump is not None and pump.moved:
            pump.moved = False
            self._look_at_pages(pump)
            self._look_at_faults(pump)

    def _look_at_owners(self, here, there):
        if (
            here is not None
            and there is not None
            and OWNERS[here.machine.state] is Owner.SOURCE
            and OWNERS[there.machine.state] is Owner.DESTINATION
        ):
            states = f"{here.machine.state} here, {there.machine.state} there"
            raise RuleBrokenError("one-owner", f"both sides say that they own the guest: {states}")

    def _look_at_held(self):
        for loop in self._held:
            if not loop._events and loop.finish is None and loop.machine.state is State.POSTCOPY_ACTIVE:
                raise RuleBrokenError("held", f"the {loop.role} goes on, and nobody has asked it to")

    @staticmethod
    def _look_at_pages(pump):
        claimed = sum(ledger.count(state) for ledger in pump.ledgers for state in CLAIMED)
        if claimed != pump.claims():
            text = f"{claimed} pages are claimed, {pump.claims()} are being placed"
            raise RuleBrokenError("claims-held", text)

    @staticmethod
    def _look_at_faults(pump):
        waited = set()
        for _, key in pump.pending:
            state = pump.ledgers[key[0]][key[1]]
            if state is PageState.REQUESTED:
                waited.add(key)
                continue
            unread = (told for _, told, _ in pump.memory.messages)
            if state is PageState.ZERO and key in pump.memory.waiting and key not in unread:
                raise RuleBrokenError("asked", f"somebody waits for page {key}, which is zeros and is not placed")
        requested = sum(ledger.count(PageState.REQUESTED) for ledger in pump.ledgers)
        if len(waited) != requested:
            raise RuleBrokenError("asked", f"{requested} pages are waited for, {len(waited)} of them accounted for")
        if waited and not pump.alone and pump.lines and not waited <= pump.requested:
            raise RuleBrokenError("asked", f"nobody asked for {sorted(waited - pump.requested)}")
