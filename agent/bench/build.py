"""Builds agent.bench._floor, what the bench needs that Python would disturb, with cffi (API mode, out of line).

That is the barest loop that the product is held against, and whoever asks for metrics meanwhile.
"""

from pathlib import Path

from cffi import FFI

HERE = Path("agent/bench")
HISTOGRAM = Path("postcopy/pump")
SOURCES = ["asker.c", "floor.c", "floor_destination.c", "floor_memory.c", "floor_source.c"]
HEADERS = ["asker.h", "floor.h", "floor_inside.h"]
SEEN = ["floor.cdef", "asker.cdef"]

ffibuilder = FFI()
for name in SEEN:
    ffibuilder.cdef((Path(__file__).parent / name).read_text(encoding="utf-8"))
ffibuilder.set_source(
    "agent.bench._floor",
    '#include "asker.h"\n#include "floor.h"',
    sources=[str(HERE / name) for name in SOURCES],
    include_dirs=[str(HERE), str(HISTOGRAM)],
    depends=[*(str(HERE / name) for name in [*HEADERS, *SEEN]), str(HISTOGRAM / "histogram.h")],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
