"""What tests of several rooms need of the machine."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from pathlib import Path

import hypothesis
import pytest

from tests.lacking import lacking

# How long an example takes is the machine's affair, and no time is asserted.
hypothesis.settings.register_profile("postcopy", deadline=None)
hypothesis.settings.load_profile("postcopy")


@contextlib.contextmanager
def kernel_setting(path, value):
    """Give a kernel setting a value and put back, at the end, what was there."""
    path = Path(path)
    try:
        former = path.read_text()
        path.write_text(value)
    except OSError as refused:
        lacking(f"{path} cannot be set to {value!r}: {refused}")
    # Files that offer a choice show all of it, with the chosen word in brackets.
    chosen = former.split("[")[1].split("]")[0] if "[" in former else former.strip()
    try:
        yield chosen
    finally:
        path.write_text(chosen)


@pytest.fixture
def set_kernel():
    """Return a function that sets a kernel setting until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda path, value: stack.enter_context(kernel_setting(path, value))


@pytest.fixture
def many_descriptors():
    """Let this process have as many connections as a crowd is large."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 4096), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def small_pages(set_kernel):
    """Keep transparent huge pages out of shared memory that does not ask for them: a page written is a page there."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if setting.exists() and not {"[never]", "[advise]"} & set(setting.read_text().split()):
        set_kernel(setting, "never")


@pytest.fixture
def huge_pages(set_kernel):
    """Return a function that makes sure that `count` huge pages of a hugetlb memory type are unclaimed."""

    def reserve(type_name, count):
        from postcopy.errors import HostError
        from postcopy.kernel import memory_type

        huge = memory_type(type_name)
        try:
            pool = huge.pool()
        except HostError as missing:
            lacking(str(missing))
        if pool.unclaimed < count:
            set_kernel(huge.pool_folder / "nr_hugepages", str(pool.total + count - pool.unclaimed))
        given = huge.pool().unclaimed
        if given < count:
            lacking(f"{count} pages of {type_name} asked for, {given} given")

    return reserve


@pytest.fixture
def mount(tmp_path_factory):
    """Return a function that mounts a filesystem in a new folder until the test ends."""
    with contextlib.ExitStack() as stack:

        def mounted(kind, options):
            folder = tmp_path_factory.mktemp(kind)
            command = ["mount", "-t", kind, "-o", options, "none", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lacking(f"{kind} cannot be mounted: {done.stderr.strip()}")
            # Lazily: a test that failed with a file of it still open must not leave the mount behind.
            stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
            return folder

        yield mounted
