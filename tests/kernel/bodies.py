"""Tests whose body runs in a child process, and threads that touch memory there."""

from __future__ import annotations

import functools
import importlib
import threading
from pathlib import Path

from postcopy.kernel import calls
from tests.child import run_in_child

PAGE = 4096
WAIT = 10.0  # seconds; a deadline, never a delay


def in_child(test):
    """Run the test's body in a process of its own, which is killed if it hangs. Arguments must be picklable."""

    @functools.wraps(test)
    def wrapper(**arguments):
        return run_in_child(call_body, test.__module__, test.__name__, arguments)

    wrapper.body = test
    return wrapper


def call_body(module, name, arguments):
    return getattr(importlib.import_module(module), name).body(**arguments)


def open_descriptors():
    """Return how many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


class Touch(threading.Thread):
    """Reads from memory, or writes `content` to it, or does what `action` says, in a thread that may have to wait."""

    def __init__(self, address=0, length=1, content=None, action=None):
        super().__init__(daemon=True)
        self._work = action or functools.partial(self._touch, address, length, content)
        self.result = None
        self.error = None
        self.start()

    @staticmethod
    def _touch(address, length, content):
        return calls.read_memory(address, length) if content is None else calls.write_memory(address, content)

    def run(self):
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error

    def finish(self):
        """Wait for its end and return what it read."""
        self.join(WAIT)
        assert not self.is_alive(), "still waiting in its page fault"
        if self.error is not None:
            raise self.error
        return self.result


def next_message(uffd):
    """Return the one message that comes next."""
    assert uffd.poll(WAIT), "no message came"
    (message,) = uffd.read(1)
    return message
