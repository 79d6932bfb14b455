"""Texts that show what is typed and what is printed: read out of Markdown, played in real shells, compared in shape.

Blocks marked `console` are played in their order. A line that begins with a prompt ("$ ", "a$ ") is typed, what follows
up to the next prompt is what it must print; "…" stands for any lines. Digits may differ, and units with them.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT = re.compile(r"^(\w*\$) (.*)$")
# A further terminal: the shell that it opens has a prompt of its own.
TERMINAL = re.compile(r"^(.*)\benv PS1='(\w+\$) ' (.*)bash --norc$")
FIGURE = re.compile(r"\d[\d.,:]*(?:e[+-]\d+)?(?:\s?(?:ns|µs|ms|s|B|KiB|MiB|GiB)\b)?")
# What only looks may be asked again until it shows what was promised, as a reader would do.
LOOKS = ("cat ", "tail ", "postcopy status ", "promtool query ")
SECONDS = 60
LOOKING_SECONDS = 20


@dataclass(slots=True)
class Step:
    """What is typed at which prompt, and the lines that it prints."""

    prompt: str
    typed: str
    printed: list[str] = field(default_factory=list)


def steps(markdown: str) -> Iterator[Step]:
    """Yield all steps of a text; what a here-document takes in belongs to what is typed."""
    for block in BLOCK.findall(markdown):
        step, ending = None, None
        for line in block.splitlines():
            prompt = PROMPT.match(line)
            if ending is not None and step is not None:
                step.typed += f"\n{line}"
                ending = None if line == ending else ending
            elif prompt is not None:
                if step is not None:
                    yield step
                step = Step(prompt[1], prompt[2])
                document = re.search(r"<<'(\w+)'", step.typed)
                ending = document[1] if document is not None else None
            else:
                assert step is not None, f"printed by nobody: {line}"
                step.printed.append(line)
        if step is not None:
            yield step


def shape(line: str) -> str:
    """Return what stays the same of a line from one run to the next."""
    return " ".join(FIGURE.sub("#", line).split())


def alike(printed: list[str], promised: list[str]) -> bool:
    """Say whether lines have the shapes that were promised."""
    pattern = "".join("(?:.*\n)*" if line == "…" else re.escape(shape(line)) + "\n" for line in promised)
    return re.fullmatch(pattern, "".join(shape(line) + "\n" for line in printed)) is not None


class Shell:
    """A bash that is typed into; all that it starts ends with it."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            cwd=folder, env=environment, start_new_session=True,
        )  # fmt: skip

    def type(self, text: str) -> tuple[int, list[str]]:
        """Type a command; return its exit status and the lines that it prints. AssertionError where it does not end."""
        assert self._process.stdin is not None
        end = f"end-of-{uuid.uuid4().hex}"
        self._process.stdin.write(f"{text}\nprintf '%s %s\\n' {end} $?\n".encode())
        self._process.stdin.flush()
        said = self._read_until(end, time.monotonic() + SECONDS, text)
        lines = said.decode().splitlines()
        return int(lines.pop().rpartition(" ")[2]), lines

    def _read_until(self, end: str, deadline: float, text: str) -> bytes:
        assert self._process.stdout is not None
        said = b""
        while not re.search(rb"%s \d+\n$" % end.encode(), said):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text}: still running after {SECONDS} s, having said {said.decode()}"
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            assert more, f"{text}: the shell ended, having said {said.decode()}"
            said += more
        return said

    def close(self) -> None:
        """End it, and all that it has started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def play(markdown: str, folder: Path, environment: dict[str, str]) -> int:
    """Play all steps and return how many there were; AssertionError at the first that does what was not promised."""
    shells = {"$": Shell(["bash", "--norc"], folder, environment)}
    count = 0
    try:
        for step in steps(markdown):
            count += 1
            terminal = TERMINAL.match(step.typed)
            if terminal is not None:
                (here,) = shells["$"].type("pwd")[1]
                command = ["bash", "-c", f"exec {terminal[1]} env {terminal[3]} bash --norc"]
                shells[terminal[2]] = Shell(command, Path(here), environment)
            else:
                perform(shells[step.prompt], step)
    finally:
        for shell in shells.values():
            shell.close()
    return count


def perform(shell: Shell, step: Step) -> None:
    """Type a step and compare; what only looks is looked at again for a while."""
    deadline = time.monotonic() + LOOKING_SECONDS
    while True:
        status, printed = shell.type(step.typed)
        if status == 0 and alike(printed, step.printed):
            return
        again = step.typed.startswith(LOOKS) and time.monotonic() < deadline
        assert again, "\n".join((f"{step.prompt} {step.typed}", *printed, f"status {status}"))
        time.sleep(0.1)  # between two looks, not to force an order
