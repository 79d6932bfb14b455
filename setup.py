"""Build hook: cffi's out-of-line modules cannot be declared in pyproject.toml yet (python-cffi/cffi#55)."""

import sysconfig

from setuptools import setup

# The limited API does not exist on free-threaded interpreters; cffi drops it there as well.
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
setup(
    cffi_modules=[
        "postcopy/kernel/build.py:ffibuilder",
        "postcopy/pump/build.py:ffibuilder",
        "postcopy/guest/build.py:ffibuilder",
        "agent/bench/build.py:ffibuilder",
    ],
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
