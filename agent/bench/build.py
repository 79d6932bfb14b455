"""Builds agent.bench._floor, the barest loop that the product is held against, with cffi (API mode, out of line)."""

from pathlib import Path

from cffi import FFI

HERE = Path("agent/bench")
HISTOGRAM = Path("postcopy/pump")
SOURCES = ["floor.c", "floor_destination.c", "floor_memory.c", "floor_source.c"]
HEADERS = ["floor.h", "floor_inside.h"]

ffibuilder = FFI()
ffibuilder.cdef((Path(__file__).parent / "floor.cdef").read_text(encoding="utf-8"))
ffibuilder.set_source(
    "agent.bench._floor",
    '#include "floor.h"',
    sources=[str(HERE / name) for name in SOURCES],
    include_dirs=[str(HERE), str(HISTOGRAM)],
    depends=[*(str(HERE / name) for name in [*HEADERS, "floor.cdef"]), str(HISTOGRAM / "histogram.h")],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
