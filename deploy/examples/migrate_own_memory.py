"""A migration of one's own memory: what a virtual machine monitor would embed, with a thread for its guest.

    python migrate_own_memory.py destination            prints where it listens, tcp:127.0.0.1:PORT
    python migrate_own_memory.py source tcp:127.0.0.1:PORT

The guest counts in memory, page after page. It is stopped at the source, goes on at the destination at once, and its
pages follow it. At the end the destination adds up what it counted: no step is lost, and none is made twice.
"""

import asyncio
import sys
import threading

from postcopy.errors import ProtocolError
from postcopy.kernel import Mapping, memory_type
from postcopy.link import Destination, GuestBase, KindFromState, Source
from postcopy.pages import Region

SHMEM = memory_type("shmem")
SIZE = 16 << 20
PAGES = SIZE // SHMEM.page_size


class Counter(GuestBase):
    """A guest with one vCPU, a thread: step n adds one to the number in page n, modulo the number of pages."""

    kind = "counter"

    def __init__(self, memory: Mapping, steps: int = 0) -> None:
        super().__init__()
        self.memory, self.steps = memory, steps
        self._parking, self._thread = threading.Event(), threading.Thread()

    @classmethod
    def load(cls, mappings, state):
        """Make it of what save() said at the source. Whoever may connect could have sent it: believe nothing."""
        match mappings, state:
            case [memory], {"steps": int(steps)} if 0 <= steps < 1 << 63:
                return cls(memory, steps)
        raise ProtocolError(f"no state of a counter: {state!r}")

    def start(self):
        self.first_step_at = None
        self._parking.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._parking.is_set():
            place = self.steps % PAGES * SHMEM.page_size
            number = int.from_bytes(self.memory.read(place, 8), "little")  # waits here where the page is missing
            self.memory.write(place, (number + 1).to_bytes(8, "little"))
            self.steps += 1
            self.stepped()

    def stop(self, deadline=10.0):
        self._parking.set()
        if self._thread.is_alive():
            self._thread.join(deadline)

    def save(self):
        return {"steps": self.steps}


async def source(address):
    with SHMEM.allocate(Region(0, "shmem", SHMEM.page_size, SIZE), alias=False) as memory:
        guest = Counter(memory)
        guest.start()
        while guest.steps < 2 * PAGES:  # let it write to every page
            await asyncio.sleep(0.01)
        async with Source([memory], guest) as leaving:
            report = await leaving.migrate(address)
        print(f"{guest.steps} steps here, downtime {1000 * report['downtime_seconds']:.2f} ms")
        print(f"{report['pages']['demand']} pages were asked for, {report['pages']['push']} came unasked")


async def destination():
    kinds = {Counter.kind: KindFromState(Counter.load)}
    async with Destination("tcp:127.0.0.1:0", kinds) as arriving:
        print(arriving.address, flush=True)
        finish = await arriving.migrated()
        guest = arriving.guest
        assert isinstance(guest, Counter), finish.text
        guest.stop()
        counted = sum(int.from_bytes(guest.memory.read(page * SHMEM.page_size, 8), "little") for page in range(PAGES))
        assert counted == guest.steps
        print(f"the guest is at step {guest.steps}, and so many are counted in its memory: {counted}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["destination"]:
            asyncio.run(destination())
        case ["source", address]:
            asyncio.run(source(address))
        case _:
            sys.exit(__doc__)
