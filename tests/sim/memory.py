"""The guest's memory at the destination, as the kernel keeps it: what is in the file, what is mapped, who waits.

Faults and removals enter as messages for whoever reads the userfaultfd; copy, continue and zero make pages present.
"""

from collections import deque

from .world import RuleBrokenError


class DestinationMemory:
    """`file` holds pages that have content, `mapped` those that the guest may use. `trapped` until it is whole."""

    name = "destination"

    def __init__(self, guest):
        self.guest = guest
        self.file = {}
        self.mapped = set()
        self.poisoned = set()
        self.waiting = {}  # key: threads in the kernel that wait for it
        self.messages = deque()
        self.unread_removals = 0
        self.trapped = True
        self.on_message = None
        self.contents_placed = {}  # key: how often content was placed

    # --- the guest's side ---------------------------------------------------------------------------------

    def present(self, key):
        if key in self.mapped:
            return True
        if not self.trapped:  # the kernel itself maps what the file has, or zeros
            self.file.setdefault(key, self.guest.zero(key))
            self.mapped.add(key)
            return True
        return False

    def read(self, key):
        return self.file[key]

    def write(self, key, content):
        self.file[key] = bytearray(content) if isinstance(self.file[key], bytearray) else content

    def fault(self, vcpu, key, write):
        if key in self.poisoned:
            vcpu.get_sigbus()
            return
        self.waiting.setdefault(key, []).append((vcpu, write))
        self.messages.append(("fault", key, vcpu))
        self._tell()

    def remove(self, keys):
        """Have the guest give pages back: it waits until the event is read, nothing can be placed meanwhile."""
        if not self.trapped:
            self._take_away(keys)
            return
        self.messages.append(("remove", keys, None))
        self.unread_removals += 1
        self._tell()

    def _tell(self):
        if self.on_message is not None:
            self.on_message()

    def _take_away(self, keys):
        self.guest.give_back(keys)
        for key in keys:
            self.file.pop(key, None)
            self.mapped.discard(key)

    # --- the pump's side ----------------------------------------------------------------------------------

    def removal_read(self, keys):
        """Go on with a removal whose event was read and taken note of."""
        self.unread_removals -= 1
        self._take_away(keys)

    def wake(self, key):
        """Let who waits for a page try again."""
        for vcpu, write in self.waiting.pop(key, ()):
            vcpu.go_on(key, write)

    def copy(self, key, content):
        """Place content that lies somewhere else; the kernel refuses where a page is."""
        if key in self.file:
            raise RuleBrokenError("placed-once", f"page {key} is placed where a page is already")
        self.file[key] = content
        self._placed(key)

    def write_behind(self, key, offset, data):
        """Write through the alias: nobody is told, and nothing refuses it."""
        if key not in self.file:
            self.file[key] = bytearray(self.guest.sizes[key[0]])
        page = self.file[key]
        if not isinstance(page, bytearray):
            page = self.file[key] = bytearray(page)
        page[offset : offset + len(data)] = data

    def continue_(self, key):
        """Map what the alias wrote."""
        self._placed(key)

    def _placed(self, key):
        self.contents_placed[key] = self.contents_placed.get(key, 0) + 1
        if self.contents_placed[key] > 1:
            raise RuleBrokenError("placed-once", f"page {key} is placed {self.contents_placed[key]} times")
        if self.file.get(key) != self.guest.truth[key]:
            raise RuleBrokenError("right-bytes", f"page {key} is placed with other bytes than the source had")
        self._present(key)

    def map_again(self, key):
        """Map a page of the file that the page tables lost."""
        self._present(key)

    def zero(self, key):
        """Place a page of zeros where there is none."""
        if key in self.file:
            raise RuleBrokenError("placed-once", f"zeros are placed over page {key}")
        if self.guest.truth[key] != self.guest.zero(key):
            raise RuleBrokenError("right-bytes", f"page {key} is placed as zeros, and holds data")
        self.file[key] = self.guest.zero(key)
        self._present(key)

    def _present(self, key):
        self.mapped.add(key)
        self.wake(key)

    def forget(self, key):
        """Take out of the file what came into it and was never shown."""
        if key not in self.mapped:
            self.file.pop(key, None)

    def poison(self, keys):
        """Have whoever touches these get SIGBUS."""
        for key in keys:
            self.poisoned.add(key)
            for vcpu, _ in self.waiting.pop(key, ()):
                vcpu.get_sigbus()

    def trap_no_more(self):
        """Unregister: from now on the kernel serves what was not placed."""
        self.trapped = False
        for key in list(self.waiting):
            self.wake(key)
        while self.messages:
            kind, keys, _ = self.messages.popleft()
            if kind == "remove":
                self.removal_read(keys)

    def known_as_zero(self, key):
        """Hold a page that somebody says is zero against what it is."""
        if self.guest.truth[key] != self.guest.zero(key):
            raise RuleBrokenError("right-bytes", f"page {key} is taken for zeros, and holds data")
