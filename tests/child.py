"""Run a test's body in a child process with a deadline: a thread that waits in a page fault can only be killed."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_SPAWN = multiprocessing.get_context("spawn")


class ChildFailedError(AssertionError):
    """The body raised, died of a signal or ran into its deadline."""


def _body(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        sender.send((True, function(*args)))
    except BaseException:  # whatever it was, the parent shows it
        sender.send((False, traceback.format_exc()))


def run_in_child(function: Callable[..., Any], *args: Any, deadline: float = 30.0) -> Any:
    """Call `function(*args)` (module level, picklable arguments) in a spawned process and return its result.

    Raises ChildFailedError with the child's traceback, its signal, or "deadline", after which the child is gone.
    """
    receiver, sender = _SPAWN.Pipe(duplex=False)
    child = _SPAWN.Process(target=_body, args=(sender, function, args))
    child.start()
    sender.close()
    try:
        if not receiver.poll(deadline):
            raise ChildFailedError(f"{function.__name__}: still running after its deadline of {deadline:g} s")
        try:
            passed, result = receiver.recv()
        except EOFError:
            child.join(5)
            raise ChildFailedError(f"{function.__name__}: ended with exit code {child.exitcode}") from None
        if not passed:
            raise ChildFailedError(result)
        return result
    finally:
        child.join(1 if not child.is_alive() else 0.2)
        if child.is_alive():
            child.kill()
            child.join()
        receiver.close()
