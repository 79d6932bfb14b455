"""Builds postcopy.guest._guest, the emulated guest's C, with cffi (API mode, out of line)."""

from pathlib import Path
from runpy import run_path

from cffi import FFI

HERE = Path("postcopy/guest")
HISTOGRAM = Path("postcopy/pump")
SOURCES = ["check.c", "guest.c", "kvm.c", "lost.c", "vcpu.c", "workload.c"]
HEADERS = ["check.h", "content.h", "guest.h", "kvm.h", "vcpu.h", "workload.h"]

# By its path, for nothing of the package need be importable where it is built.
limits = run_path(str(Path(__file__).parents[1] / "limits.py"))

ffibuilder = FFI()
ffibuilder.cdef((Path(__file__).parent / "guest.cdef").read_text(encoding="utf-8"))
ffibuilder.set_source(
    "postcopy.guest._guest",
    '#include "guest.h"',
    sources=[str(HERE / name) for name in SOURCES],
    include_dirs=[str(HERE), str(HISTOGRAM)],
    define_macros=limits["macros"](limits["GUEST_IN_C"]),
    depends=[
        *(str(HERE / name) for name in [*HEADERS, "guest.cdef"]),
        str(HISTOGRAM / "histogram.h"),
        "postcopy/limits.py",
    ],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
