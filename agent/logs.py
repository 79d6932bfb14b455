"""Logs: text on stderr, one line an event; nothing of a migration goes to stdout."""

from __future__ import annotations

import logging
import sys


def configure(*, debug: bool) -> None:
    """Send all logs to stderr; `debug` shows every line and where it comes from."""
    form = (
        "%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s"
        if debug
        else "%(asctime)s.%(msecs)03d %(message)s"
    )
    logging.basicConfig(
        stream=sys.stderr, level=logging.DEBUG if debug else logging.INFO, format=form, datefmt="%H:%M:%S", force=True
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def flush() -> None:
    """Write out what is still in buffers, for a process that ends without cleaning up."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()
