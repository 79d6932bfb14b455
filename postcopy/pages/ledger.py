"""The ledger: what is known of each page of a region at the destination, and who may do what to it next.

What enters: faults of the guest, pages and zero extents that arrive, placements that succeeded. What
leaves: what to do about a fault, and whether the caller won the right to write a page. It is written to be
read: the page map of the C pump does the same with atomic operations on the same byte values, and is tested
against this one.

    ABSENT ── fault ──▶ REQUESTED ── claim, zero ──▶ WATCHED ── place ──▶ PLACED
    ABSENT ── claim ──────────────▶ PLACING ── place ──▶ PLACED
                                    PLACING ── fault ──▶ WATCHED
    ABSENT ── zero ───▶ ZERO ── fault ──▶ PLACING
    ABSENT, REQUESTED ── discard ──▶ ZERO
    PLACING ── release ──▶ ABSENT              WATCHED ── release ──▶ REQUESTED
    PLACING, WATCHED ── discard ──▶ DROPPED ── drop ──▶ ZERO
                                    DROPPED ── place ──▶ PLACED
    ABSENT, REQUESTED ── poison ──▶ POISONED

Whoever moves a page to PLACING or WATCHED holds its claim: that one alone writes the page, once, and then
calls `place`. A second copy that arrives meanwhile or later finds no claim to win and is dropped, so that
it can never overwrite what the guest has written since.
"""

from __future__ import annotations

from enum import IntEnum

from postcopy.pages.bitmap import Bitmap


class PageState(IntEnum):
    """State of one page; the values are the bytes of the C page map."""

    ABSENT = 0  # nothing known, nobody asked
    REQUESTED = 1  # a vCPU waits, the page was asked for
    PLACING = 2  # claimed: one side is writing it
    PLACED = 3  # present in the guest's memory, its waiters woken
    ZERO = 4  # known to hold zeros only, not placed: it costs nothing until it is touched
    WATCHED = 5  # claimed as PLACING is, and a fault is accounted for it: its placement is news
    DROPPED = 6  # claimed, and given back by the guest meanwhile: its owner is not to place it any more
    POISONED = 7  # lost for good: whoever touches it gets SIGBUS


class Action(IntEnum):
    """What the one that reads a fault has to do about it."""

    REQUEST = 0  # ask the source for the page
    WAIT = 1  # nothing: it is on its way, and whoever places it wakes every waiter
    WAKE = 2  # the page is here: the fault crossed its placement, wake the thread
    PLACE_ZERO = 3  # the caller has the claim: place zeros, then `place`
    POISON = 4  # the page is lost: have whoever touches it know


class Ledger:
    """All pages of one region, ABSENT at first. Page numbers outside are an IndexError."""

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ValueError(f"a ledger of {pages} pages")
        self.pages = pages
        self._states = bytearray(pages)

    def __getitem__(self, page: int) -> PageState:
        if not 0 <= page < self.pages:
            raise IndexError(f"page {page} of {self.pages}")
        return PageState(self._states[page])

    def fault(self, page: int) -> Action:
        """Take note that a thread waits for `page`, and say what to do.

        ABSENT becomes REQUESTED: REQUEST, for the first fault only. REQUESTED, WATCHED and DROPPED stay, PLACING
        becomes WATCHED: WAIT. ZERO becomes PLACING: PLACE_ZERO, and the caller has the claim. PLACED stays:
        WAKE. POISONED stays: POISON.
        """
        match self[page]:
            case PageState.ABSENT:
                self._states[page] = PageState.REQUESTED
                return Action.REQUEST
            case PageState.REQUESTED | PageState.WATCHED | PageState.DROPPED:
                return Action.WAIT
            case PageState.PLACING:
                self._states[page] = PageState.WATCHED
                return Action.WAIT
            case PageState.ZERO:
                self._states[page] = PageState.PLACING
                return Action.PLACE_ZERO
            case PageState.PLACED:
                return Action.WAKE
            case PageState.POISONED:
                return Action.POISON

    def claim(self, page: int) -> bool:
        """Ask for the right to write `page`, a copy of which has arrived; False means: drop that copy.

        ABSENT becomes PLACING, REQUESTED becomes WATCHED: True. All others stay: False, their content is
        settled.
        """
        match self[page]:
            case PageState.ABSENT:
                self._states[page] = PageState.PLACING
            case PageState.REQUESTED:
                self._states[page] = PageState.WATCHED
            case _:
                return False
        return True

    def place(self, page: int) -> bool:
        """Take note that the holder of the claim has made `page` present and woken its waiters.

        PLACING becomes PLACED: False. WATCHED becomes PLACED: True, a fault waits for this news; DROPPED too, where
        the page was present before the guest gave it back, which takes its content away. Any other state is a mistake
        in the program: ValueError.
        """
        before = self[page]
        if before not in {PageState.PLACING, PageState.WATCHED, PageState.DROPPED}:
            raise ValueError(f"page {page} is placed without a claim: it is {before.name}")
        self._states[page] = PageState.PLACED
        return before is not PageState.PLACING

    def release(self, page: int) -> bool:
        """Take note that the holder of the claim gives it up, its copy having come in part; no byte of it is left.

        PLACING becomes ABSENT, WATCHED becomes REQUESTED: True, it may be claimed again. DROPPED stays: False, its
        owner has to `drop` it. Any other state is a mistake in the program: ValueError.
        """
        match self[page]:
            case PageState.PLACING:
                self._states[page] = PageState.ABSENT
            case PageState.WATCHED:
                self._states[page] = PageState.REQUESTED
            case PageState.DROPPED:
                return False
            case before:
                raise ValueError(f"page {page} is released without a claim: it is {before.name}")
        return True

    def discard(self, page: int) -> bool:
        """Take note that the guest gives `page` back; True where its content is settled by that: it is zeros.

        ABSENT and REQUESTED become ZERO: True, and who waits for it is woken to fault again. PLACING and WATCHED
        become DROPPED, PLACED and ZERO stay: False.
        """
        match self[page]:
            case PageState.ABSENT | PageState.REQUESTED:
                self._states[page] = PageState.ZERO
                return True
            case PageState.PLACING | PageState.WATCHED:
                self._states[page] = PageState.DROPPED
        return False

    def drop(self, page: int) -> None:
        """Take note that the holder of the claim has not placed a DROPPED page: it becomes ZERO. Else ValueError."""
        if self[page] is not PageState.DROPPED:
            raise ValueError(f"page {page} is dropped and nobody asked for it: it is {self[page].name}")
        self._states[page] = PageState.ZERO

    def poison(self, page: int) -> bool:
        """Take note that `page` will never come. ABSENT and REQUESTED become POISONED: True; all others stay: False."""
        if self[page] not in {PageState.ABSENT, PageState.REQUESTED}:
            return False
        self._states[page] = PageState.POISONED
        return True

    def zero(self, page: int) -> bool:
        """Take note that `page` holds zeros only; False means: its content was settled before, drop the news.

        ABSENT becomes ZERO: True, and nothing more to do. REQUESTED becomes WATCHED: True, and the caller,
        who has the claim now, places zeros and then calls `place`, for a vCPU waits. All others stay:
        False.
        """
        match self[page]:
            case PageState.ABSENT:
                self._states[page] = PageState.ZERO
            case PageState.REQUESTED:
                self._states[page] = PageState.WATCHED
            case _:
                return False
        return True

    @property
    def complete(self) -> bool:
        """True once the content of every page is here: each is PLACED or ZERO."""
        return self.count(PageState.PLACED) + self.count(PageState.ZERO) == self.pages

    def count(self, state: PageState) -> int:
        """Return the number of pages in `state`."""
        return self._states.count(state)

    def bitmap(self, *states: PageState) -> Bitmap:
        """Return the pages that are in one of `states`."""
        bitmap = Bitmap(self.pages)
        for page, state in enumerate(self._states):
            if state in states:
                bitmap.set(page)
        return bitmap

    def to_bytes(self) -> bytes:
        """Return one byte a page, as the C page map holds them."""
        return bytes(self._states)
