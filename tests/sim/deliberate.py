"""Deliberate faults: each is a mistake that somebody could make, put into the code for a while.

Most are put into the production code of the pure rooms; the pump being a model here, mistakes of its kind are put into
the model. Each has a rule that is meant for it; others may find it earlier. Here is how they are declared.
"""

from collections.abc import Callable
from dataclasses import dataclass

Patch = Callable[[object, str, object], None]


@dataclass(frozen=True)
class Fault:
    """`put(patch)` puts it in, by `patch(owner, name, value)`, which is undone afterwards; `rule` is to find it."""

    name: str
    rule: str
    put: Callable[[Patch], None]


class Faults(list[Fault]):
    """Some faults, in the order in which they are declared."""

    def fault(self, name, rule):
        """Declare one; the function takes `patch`."""

        def declare(put):
            self.append(Fault(name, rule, put))
            return put

        return declare


def row(patch, machine, key, step, action):
    """Have a machine's table say something else."""
    patch(machine, "table", {**machine.table, key: (step, action)})


def without(patch, machine, kind):
    """Have a machine never say a kind of command."""
    handle = machine.handle
    patch(machine, "handle", lambda self, event: [one for one in handle(self, event) if not isinstance(one, kind)])


def forgetful():
    """Have a machine be held by nobody."""
    return property(lambda _self: False, lambda _self, _held: None)
