"""The emulated guest once more, in plain Python and from its description alone: the oracle for the C.

Slow and obvious: passes are lists of pages, content is lists of words. In: numbers. Out: bytes of the whole memory.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

M64 = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15
PAGE = 4096


def stream(key: int, index: int) -> int:
    """Return the output number `index` of splitmix64 seeded with `key`."""
    x = (key + STEP * (index + 1)) & M64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & M64
    return x ^ x >> 31


def permutation(size: int, key: int) -> list[int]:
    """Return the keyed order of 0..size-1: three rounds on the bits of size - 1, walked until below size."""
    bits = (size - 1).bit_length()
    shift = max(1, (bits + 1) // 2)

    def scatter(x: int) -> int:
        for turn in range(3):
            x = (x + stream(key, 2 * turn)) * (stream(key, 2 * turn + 1) | 1) % (1 << bits)
            x ^= x >> shift
        return x

    order = []
    for index in range(size):
        x = scatter(index)
        while x >= size:
            x = scatter(x)
        order.append(x)
    return order


@dataclass(frozen=True)
class Model:
    """A guest of `active` visited pages, `holes` and `zeroed` blank ones."""

    workload: str
    vcpus: int
    seed: int
    nonce: int
    active: int
    holes: int = 0
    zeroed: int = 0
    stride: int = 1
    random_start: bool = False

    def pass_pages(self, vcpu: int, number: int) -> list[int]:
        """Return the pages of pass `number` in the order in which `vcpu` visits them."""
        n = self.active
        key = stream(stream(stream(self.seed, 1), vcpu), number)
        start = stream(stream(self.seed, 3), vcpu) % n if self.random_start else vcpu * n // self.vcpus
        if self.workload == "increment":
            return list(range(n))
        if self.workload == "sequential":
            return [(start + i) % n for i in range(n)]
        if self.workload == "stride":
            return [(start + i * self.stride) % n for i in range(n)]
        if self.workload == "random":
            return permutation(n, key)
        scramble = permutation(n, stream(self.seed, 2))
        slots = [scramble[x >> level] for level in range(n.bit_length()) for x in range(n)]
        return [slots[i] for i in permutation(len(slots), key)]

    @property
    def pass_steps(self) -> int:
        return len(self.pass_pages(0, 0))

    def position(self, steps: int) -> list[int]:
        """Return where a vCPU stands after `steps` steps, as the state has it."""
        return [steps // self.pass_steps, steps % self.pass_steps, steps]

    def visits(self, vcpu: int, steps: int) -> list[int]:
        """Return how often each active page was visited in the first `steps` steps."""
        passes, rest = divmod(steps, self.pass_steps)
        whole, part = Counter(self.pass_pages(vcpu, 0)), Counter(self.pass_pages(vcpu, passes)[:rest])
        return [passes * whole[page] + part[page] for page in range(self.active)]

    def base(self, page: int) -> int:
        return stream(stream(stream(self.seed, 0), self.nonce), page)

    def lane_offset(self, page: int, vcpu: int) -> int:
        """Return the offset in the memory of the word that belongs to this vCPU."""
        return page * PAGE + (self.base(page) + vcpu) % 512 * 8

    def memory(self, steps: list[int]) -> bytes:
        """Return the whole memory after vCPU v has made steps[v] steps."""
        counts = [self.visits(vcpu, done) for vcpu, done in enumerate(steps)]
        pages = []
        for page in range(self.active):
            base = self.base(page)
            words = [stream(base, i) for i in range(512)]
            for vcpu in range(self.vcpus):
                lane = (base + vcpu) % 512
                if self.workload == "increment":
                    first = stream(M64 ^ stream(stream(self.seed, 0), self.nonce), vcpu)
                    words[lane] = words[lane] & ~0xFF | (first + counts[vcpu][page]) & 0xFF
                else:
                    turned = (base << 21 | base >> 43) & M64
                    words[lane] += counts[vcpu][page] * ((turned + vcpu * STEP) & M64 | 1)
            pages.append(b"".join((word & M64).to_bytes(8, "little") for word in words))
        return b"".join(pages) + bytes((self.holes + self.zeroed) * PAGE)

    def state(self, steps: list[int], **changes: object) -> dict[str, object]:
        """Return the device state of a guest that has made these steps."""
        blank = self.holes + self.zeroed
        return {
            "kind": "emulated",
            "version": 2,
            "workload": self.workload,
            "seed": self.seed,
            "nonce": self.nonce,
            "guest_pages": self.active + blank,
            "blank_pages": blank,
            "hole_pages": self.holes,
            "stride": self.stride,
            "random_start": self.random_start,
            "steps_max": None,
            "steps_per_second": 0,
            "vcpus": [self.position(done) for done in steps],
            **changes,
        }
