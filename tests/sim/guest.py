"""The guest: vCPUs that read and write pages, at one side or the other, and what each page has to hold.

Pages are named (region, page number). Whatever a vCPU reads is compared with what the guest wrote last: a page that is
wrong where it is looked at ends the story.
"""

from postcopy.pages import Layout, Region

from .world import RuleBrokenError

STAMP = 8  # bytes that make one page's content unlike all others


class Guest:
    """`truth` is what each page has to hold, `place` the memory it runs on at this moment, None: it stands still."""

    def __init__(self, world, layout, vcpus, accesses):
        self.world = world
        self.layout = layout
        self.keys = [(region.index, page) for region in layout.regions for page in range(region.pages)]
        self.sizes = [region.page_size for region in layout.regions]
        self.zeros = {size: bytes(size) for size in self.sizes}
        self.truth = {}
        self.place = None
        self.first_step_at = None  # where it runs
        self.on_first_step = None
        self.vcpus = [Vcpu(self, number, accesses) for number in range(vcpus)]
        self.pace = world.one_of((0.0005, 0.005, 0.05))
        self.lives = 0  # times that it was started or stopped
        self._stamps = 0

    def content(self, key):
        """Return new content for a page."""
        self._stamps += 1
        return self._stamps.to_bytes(STAMP, "little") * (self.sizes[key[0]] // STAMP)

    def zero(self, key):
        """Return a page of zeros."""
        return self.zeros[self.sizes[key[0]]]

    def start(self, place):
        """Run on this memory."""
        self.world.tell("guest", "runs at the", place.name)
        self.place = place
        self.lives += 1
        self.first_step_at = self.on_first_step = None
        for vcpu in self.vcpus:
            vcpu.begin(self.lives)

    def stop(self):
        """Stand still."""
        self.world.tell("guest", "stands still")
        self.place = None
        self.lives += 1

    def give_back(self, keys):
        """Let pages go: they read as zeros from now on."""
        for key in keys:
            self.truth[key] = self.zero(key)


class Vcpu:
    """One thread of the guest: touches a page, then another one; waits where a page is not here."""

    def __init__(self, guest, number, accesses):
        self.guest = guest
        self.number = number
        self.accesses = accesses
        self.waits_for = None
        self.dead = False  # of SIGBUS
        self._life = 0
        self._at = 0

    def begin(self, life):
        self._life = life
        self.left = self.accesses
        self.waits_for = None
        self._think()

    def _think(self):
        world = self.guest.world
        world.after(self.guest.pace * world.chance(), self._touch, self._life, None, False)

    def _choose(self):
        world, keys = self.guest.world, self.guest.keys
        self._at = (self._at + 1) % len(keys) if world.chance() < 0.5 else world.below(len(keys))
        return keys[self._at]

    def _touch(self, life, key, write):
        guest = self.guest
        if life != guest.lives or guest.place is None or self.dead:
            return
        if key is None:
            key, write = self._choose(), guest.world.chance() < 0.5
        if not guest.place.present(key):
            self.waits_for = key
            guest.place.fault(self, key, write)
            return
        self.waits_for = None
        content = guest.place.read(key)
        if content != guest.truth[key]:
            raise RuleBrokenError("woken-right", f"vCPU {self.number} reads {summary(content)} in page {key}, "
                                                 f"which holds {summary(guest.truth[key])}")  # fmt: skip
        if write:
            guest.truth[key] = guest.content(key)
            guest.place.write(key, guest.truth[key])
        if guest.first_step_at is None:
            guest.first_step_at = guest.world.now
            if guest.on_first_step is not None:
                guest.on_first_step()
        self.left -= 1
        if self.left > 0:
            self._think()

    def go_on(self, key, write):
        """Be woken: try again."""
        world = self.guest.world
        world.after(0.0001 * world.chance(), self._touch, self._life, key, write)

    def get_sigbus(self):
        """Touch a page that is lost for good."""
        self.dead = True
        self.waits_for = None


class SourceMemory:
    """The guest's memory at the source: all of it is present. `holes` were never written."""

    name = "source"

    def __init__(self, guest, holes):
        self.guest = guest
        self.pages = {}
        for key in guest.keys:
            self.pages[key] = guest.zero(key) if key in holes else guest.content(key)
            guest.truth[key] = self.pages[key]
        self.holes = set(holes)
        self.released = False

    def present(self, _key):
        return True

    def read(self, key):
        return self.pages[key]

    def write(self, key, content):
        self.holes.discard(key)
        self.pages[key] = content

    def region(self, index):
        """Return what postcopy.link.push.survey looks at."""
        return Surveyed(self, self.guest.layout.regions[index])


class Surveyed:
    """One region: where it holds data."""

    def __init__(self, memory, region):
        self.memory = memory
        self.region = region

    def data_extents(self):
        """Yield runs of pages that are no holes."""
        size, begin = self.region.page_size, None
        for page in range(self.region.pages + 1):
            data = page < self.region.pages and (self.region.index, page) not in self.memory.holes
            if data and begin is None:
                begin = page
            elif not data and begin is not None:
                yield begin * size, (page - begin) * size
                begin = None


def layout_of(world):
    """Draw a guest's memory."""
    count = world.one_of((1, 1, 1, 2, 3))
    pages = world.one_of((3, 8, 13, 24, 40))
    sizes = [world.one_of((4096, 4096, 8192)) for _ in range(count)]
    return Layout(
        tuple(
            Region(index, "shmem", size, size * max(1, pages // count + world.below(3)))
            for index, size in enumerate(sizes)
        )
    )


def summary(content):
    """Name a page's content in short."""
    stamps = {bytes(content[at : at + STAMP]) for at in range(0, len(content), STAMP)}
    words = sorted(str(int.from_bytes(stamp, "little")) for stamp in stamps)
    return "zeros" if words == ["0"] else "version " + " and ".join(words)
