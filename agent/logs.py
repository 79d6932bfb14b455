"""Logs: one line an event on stderr, words on a terminal and an object of JSON elsewhere; stdout is for data.

Records enter; lines leave, each with the role and the migration that it is about where there is one (JSON), and before
all with the priority that systemd's journal reads where stderr is the journal (sd-daemon(3)).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Literal

import click

from postcopy.link.about import about

Format = Literal["auto", "text", "json"]
FORMATS: tuple[Format, ...] = ("auto", "text", "json")

# syslog(3)
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def configure(*, debug: bool, form: Format = "auto") -> None:
    """Send all logs to stderr; `debug` shows every line and where it comes from."""
    handler = logging.StreamHandler(sys.stderr)
    chosen = form if form != "auto" else "text" if sys.stderr.isatty() else "json"
    lines = JsonLines() if chosen == "json" else text_lines(debug=debug)
    handler.setFormatter(ForJournal(lines) if stderr_is_journal() else lines)
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler], force=True)
    for others in ("asyncio", "matplotlib"):
        logging.getLogger(others).setLevel(logging.WARNING)


def text_lines(*, debug: bool) -> logging.Formatter:
    """Make the format for people."""
    where = "%(levelname)s %(name)s: " if debug else ""
    return logging.Formatter(f"%(asctime)s.%(msecs)03d {where}%(message)s", "%H:%M:%S")


class JsonLines(logging.Formatter):
    """An object a line: time (UTC), level, logger, message; role, migration, state and error where there are such."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        whom = about()
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "role": whom.role,
            "migration": whom.migration,
            "state": getattr(record, "state", ""),
            "message": record.getMessage().removeprefix(f"{whom.role}: "),
            "error": self.formatException(record.exc_info) if record.exc_info else "",
        }
        return json.dumps({key: value for key, value in said.items() if value}, ensure_ascii=False)


class ForJournal(logging.Formatter):
    """Another format's lines, each with its priority before it."""

    def __init__(self, lines: logging.Formatter) -> None:
        super().__init__()
        self._lines = lines

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines."""
        priority = f"<{PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(priority + line for line in self._lines.format(record).splitlines())


def stderr_is_journal() -> bool:
    """Whether systemd connected stderr to its journal, and nobody has put it elsewhere since (systemd.exec(5))."""
    try:
        there = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{there.st_dev}:{there.st_ino}"


def last_words(text: str) -> None:
    """Say why this process ends: as all else of it where its log is JSON, to the person who typed it otherwise."""
    formatters = [handler.formatter for handler in logging.getLogger().handlers]
    if about().role and not any(type(one) is logging.Formatter for one in formatters):
        logging.getLogger("postcopy.agent").error("%s", text)
    else:
        click.echo(f"postcopy: {text}", err=True)


def flush() -> None:
    """Write out what is still in buffers, for a process that ends without cleaning up."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()
