"""The doctor's findings for people: one document enters, tables leave.

What another host says of itself is shown as it is, as text: nothing in it is markup, and what does not print is left
out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from postcopy.pages.units import format_size

# A pipe has no width of its own.
PIPE_COLUMNS = 200
Facts = dict[str, Any]
Row = tuple[str, ...]


def show(document: Facts) -> None:
    """Print all of it on stdout."""
    terminal = sys.stdout.isatty()
    plain = "NO_COLOR" in os.environ or None
    console = Console(highlight=False, width=None if terminal else PIPE_COLUMNS, no_color=plain)
    if terminal:
        _print(console, document)
        return
    with console.capture() as captured:
        _print(console, document)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _print(console: Console, document: Facts) -> None:
    for part in parts(document):
        # A command that is to be copied must not be cut into lines.
        console.print(part, soft_wrap=isinstance(part, Text))


def parts(document: Facts) -> Iterator[Table | Text]:
    """Yield what is printed, in the order in which somebody reads it: headings, tables, and commands to copy."""
    yield _heading("This host")
    yield _table(("", ""), _host(document))
    yield _heading("userfaultfd")
    yield _table(("opened by", "for whom", "here"), _ways(document["userfaultfd"], document["user"]))
    yield _heading("Memory types")
    yield _table(("type", "page", "mode", "tried, and granted"), _types(document))
    yield _problems("Problems", document["problems"])
    if document["needs"]:
        yield _heading("Needed")
        yield _table(("need", "", "mend it, as root, with"), _needs(document["needs"]))
    peer = document["peer"]
    if peer is not None:
        yield _heading(f"Compared with {peer['address']}")
        yield _table(("what", "here", "there"), _rows(peer["differences"], ("what", "here", "there")))
        yield _problems("Problems there", peer["problems"])
        yield _heading("A migration there")
        yield _table(("", ""), _verdict(peer))


def _heading(text: str) -> Text:
    return Text(printable(text), style="bold")


def _table(heads: Row, rows: Iterable[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=any(heads))
    for number, head in enumerate(heads):
        table.add_column(head, header_style="dim", style="cyan" if number == 0 else "", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if not table.rows:
        table.add_row("none")
    table.add_row()
    return table


def printable(text: str) -> str:
    """Return what a terminal may be shown of a text that somebody else wrote."""
    return "".join(character for character in text if character.isprintable())


def _rows(maps: list[Facts], keys: Row) -> Iterator[Row]:
    for one in maps:
        yield tuple(str(one[key] or "") for key in keys)


def _problems(title: str, problems: list[Facts]) -> Text:
    text = Text(f"{title}\n", style="bold")
    for one in problems:
        text.append(f"{printable(one['problem'])}; this hinders {one['hinders']}\n", style="not bold yellow")
        if one["mend"] is not None:
            text.append(f"    # {printable(one['mend'])}\n", style="not bold")
    if not problems:
        text.append("none\n", style="not bold")
    return text


def _host(document: Facts) -> Iterator[Row]:
    cpus, memory, clock = document["cpus"], document["memory"], document["clock_source"]
    yield "software", document["software"]
    yield "kernel", f"{document['kernel']}, {document['architecture']}"
    yield "CPUs", f"{cpus['allowed']} of {cpus['online']} for this process"
    yield "clock source", f"{clock['current']} (of {', '.join(clock['available'])})"
    yield "memory", f"{format_size(memory['available_bytes'])} available by {memory['limited_by']}"
    yield "memlock", f"{_limit(document['memlock']['soft_bytes'])}, at most {_limit(document['memlock']['hard_bytes'])}"
    thp = document["transparent_huge_pages"]
    yield "THP", f"anonymous {thp['anonymous'] or 'unknown'}, shmem {thp['shmem'] or 'unknown'}"
    for pool in document["hugetlb_pools"]:
        counts = f"{pool['nr']} there, {pool['free']} free, {pool['resv']} of them promised, {pool['surplus']} surplus"
        yield f"huge pages of {format_size(pool['page_size'])}", counts
    yield "KVM", document["kvm"]["refusal"] or f"yes, API version {document['kvm']['api_version']}"
    openssl = document["openssl"]
    yield "OpenSSL", f"{openssl['python']}; {openssl['library']}: {openssl['refusal'] or 'loads'}"
    uffd = document["userfaultfd"]
    if uffd["refusal"] is None:
        yield "features", ", ".join(name for name, there in uffd["features"].items() if there)
        lacking = [name for name, there in uffd["features"].items() if not there]
        yield (
            "not there",
            ", ".join([*lacking, *(f"unknown bit {bit} is" for bit in uffd["unknown_features"])]) or "none",
        )


def _limit(size: int | None) -> str:
    return "unlimited" if size is None else format_size(size)


def _ways(uffd: Facts, user: int) -> Iterator[Row]:
    device = uffd["device"]
    allowed = uffd["unprivileged_userfaultfd"]
    for way in uffd["ways"]:
        if way["by"].startswith("/"):
            whom = f"mode {device['mode']}, user {device['user']}, group {device['group']}" if device else "nobody"
        elif way["by"].endswith("only"):
            whom = "anybody; serves no fault of system calls or KVM"
        else:
            whom = "anybody" if allowed == "1" else f"CAP_SYS_PTRACE (vm.unprivileged_userfaultfd={allowed})"
        yield way["by"], whom, way["refusal"] or f"works for user {user}"


def _types(document: Facts) -> Iterator[Row]:
    for kind in document["memory_types"]:
        yield from _grants(kind["name"], kind["page_size"], kind["modes"], kind["reason"])


def _grants(name: str, page_size: int, modes: list[Facts], reason: str | None) -> Iterator[Row]:
    label: Row = (name, format_size(page_size))
    for mode in modes:
        yield (*label, mode["mode"], f"no: {mode['refusal']}" if mode["ioctls"] is None else _worked(mode))
        label = ("", "")
    if reason is not None:
        yield (*label, "", reason)


def _worked(mode: Facts) -> str:
    """Say what worked, what REGISTER promises and was refused all the same, and what was not tried."""
    words = ", ".join(name for name in mode["ioctls"] if name not in mode["untried"])
    if mode["untried"]:
        words += f"; not tried: {', '.join(mode['untried'])}"
    if mode["refused"]:
        words += f"; promised, and refused: {', '.join(f'{name} ({why})' for name, why in mode['refused'].items())}"
    return words


def _needs(needs: list[Facts]) -> Iterator[Row]:
    for need in needs:
        yield need["need"], "here" if need["met"] else need["reason"], need["mend"] or ""


def _verdict(peer: Facts) -> Iterator[Row]:
    migration = peer["migration"]
    what = f"{format_size(migration['size_bytes'])} of {migration['memory']}, mode {migration['mode']}"
    yield what, "would work" if peer["works"] else f"would not work: {peer['reason']}"
