"""Two hosts side by side: this host and a destination's address enter, what differs and a verdict leave.

The destination tries the migration that is asked about on the way that a real one would take, and undoes it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import uvloop

from agent.doctor.problems import problems_of
from postcopy.guest.kinds import kind_named
from postcopy.kernel import memory_type
from postcopy.link.address import Address
from postcopy.link.placement import handling, known_mode
from postcopy.link.probe import ask
from postcopy.link.tls import Credentials
from postcopy.pages.regions import Layout, Region
from postcopy.pages.units import format_size
from postcopy.wire.control import GuestOffer
from postcopy.wire.messages import READY

Facts = dict[str, Any]

GUEST = "emulated"


class Migration(NamedTuple):
    """What would migrate; `mode` is None where the destination's own will do."""

    layout: Layout
    guest: GuestOffer
    mode: str | None


def migration_of(memory: str, size: int, options: dict[str, Any]) -> Migration:
    """Return the migration that the command line means; UsageError where it makes no sense on any host."""
    layout = Layout((Region(0, memory, memory_type(memory).page_size, size),))
    mode = options["mode"]
    if mode is not None:
        handling(known_mode(mode), memory)
    kind = kind_named(options["guest"] or GUEST)
    return Migration(layout, GuestOffer(kind.name, options["vcpus"] or 1), mode)


def compare(host: Facts, address: Address, migration: Migration, tls: Credentials | None) -> Facts:
    """Ask the destination and lay its answer beside this host; MigrationFailed where there is no answer."""
    answer = uvloop.run(ask(address, migration.layout, migration.guest, tls=tls))
    reason = answer.text if answer.answer != READY else None
    if reason is None and migration.mode not in {None, answer.mode}:
        reason = f"it places pages in mode {answer.mode}: start it with --mode {migration.mode}"
    (region,) = migration.layout.regions
    try:
        problems, differences = problems_of(answer.host), list(_differences(host, answer.host))
    except (KeyError, TypeError, ValueError, AttributeError):
        problems, differences = [], [("description", "", "not understood: another version of the program wrote it")]
    return {
        "address": str(address),
        "migration": {"memory": region.type, "size_bytes": region.size, "mode": answer.mode},
        "works": reason is None,
        "answer": answer.answer,
        "reason": reason,
        "differences": [dict(zip(("what", "here", "there"), one, strict=True)) for one in differences],
        "problems": problems,
        "host": answer.host,
    }


def _differences(here: Facts, there: Facts) -> list[tuple[str, str, str]]:
    """Return what is not the same on both, in words."""
    ours, theirs = dict(_points(here)), dict(_points(there))
    names = [*ours, *(name for name in theirs if name not in ours)]
    sides = [(name, ours.get(name, "no"), theirs.get(name, "no")) for name in names]
    return [(name, one, other) for name, one, other in sides if one != other]


def _points(host: Facts) -> list[tuple[str, str]]:
    """Return what is compared of a host."""
    uffd, thp = host["userfaultfd"], host["transparent_huge_pages"]
    points = [
        ("software", str(host["software"])),
        ("kernel", str(host["kernel"])),
        ("architecture", str(host["architecture"])),
        ("page size", format_size(int(host["memory"]["page_size"]))),
        ("CPUs", str(host["cpus"]["allowed"])),
        ("clock source", str(host["clock_source"]["current"])),
        ("userfaultfd", ", ".join(str(way["by"]) for way in uffd["ways"] if way["refusal"] is None) or "no"),
        ("userfaultfd's features", ", ".join(name for name, there in uffd["features"].items() if there) or "none"),
        ("THP, anonymous", str(thp["anonymous"])),
        ("THP, shmem", str(thp["shmem"])),
        ("KVM", "yes" if host["kvm"]["refusal"] is None else "no"),
        ("OpenSSL 3", "yes" if host["openssl"]["refusal"] is None else "no"),
    ]
    for kind in host["memory_types"]:
        granted = ", ".join(str(mode["mode"]) for mode in kind["modes"] if mode["ioctls"] is not None)
        points.append(
            (f"{kind['name']}", f"{granted or 'no'}{'' if kind['reason'] is None else '; none to be had now'}")
        )
    for pool in host["hugetlb_pools"]:
        free = int(pool["free"] or 0) - int(pool["resv"] or 0)
        points.append((f"huge pages of {format_size(int(pool['page_size']))}", f"{free} to be had"))
    return points
