"""`python -m agent`, and the script `postcopy`: the command line, which Ctrl-C ends in one line from the start."""

from __future__ import annotations

import os
import signal
from typing import Any, NoReturn


def main() -> NoReturn:
    """Run the command line; exit statuses leave."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in a script's background
        signal.signal(signal.SIGINT, _quit)  # while modules are loaded; the command line has ways of its own
    from agent import cli  # noqa: PLC0415 - see above

    cli.main()


def _quit(_number: int, _frame: Any) -> NoReturn:
    os.write(2, b"postcopy: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
