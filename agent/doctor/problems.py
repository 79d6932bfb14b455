"""What hinders on a host: its description enters, problems leave, each with the one command that mends it.

A description of another host is its agent's word. So no command holds a text of it, only numbers, and commands that
are known here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

from postcopy.pages.units import format_size

Facts = dict[str, Any]
Problem = dict[str, str | None]

# What each feature is to a migration, and since when Linux has it.
FEATURES = {
    "MISSING_SHMEM": ("shmem cannot be trapped", "4.11"),
    "MISSING_HUGETLB": ("huge pages cannot be trapped", "4.11"),
    "THREAD_ID": ("two vCPUs on one page cannot be told apart", "4.14"),
    "MINOR_HUGETLB": ("huge pages cannot be received in place", "5.13"),
    "MINOR_SHMEM": ("shmem cannot be received in place", "5.14"),
}
USER_MODE_ONLY = "userfaultfd(2), user mode only"
# Reading them leaves the processor: the clock is read twice for each fault.
SLOW_CLOCKS = {"hpet", "acpi_pm", "pit", "jiffies", "refined-jiffies"}
CLOCK = "/sys/devices/system/clocksource/clocksource0/current_clocksource"


def problems_of(host: Facts) -> list[Problem]:
    """Return what is wrong with a host; commands are for root."""
    return [
        {"problem": problem, "hinders": hinders, "mend": mend}
        for find in (_opening, _features, _pools, _kvm, _openssl, _clock)
        for problem, hinders, mend in find(host)
    ]


def mend_opening(host: Facts) -> str | None:
    """Return the command that lets the host's user open a userfaultfd that is told of every fault; None: it may."""
    uffd = host["userfaultfd"]
    if any(way["refusal"] is None and way["by"] != USER_MODE_ONLY for way in uffd["ways"]):
        return None
    if uffd["device"] is None:
        return "sysctl -w vm.unprivileged_userfaultfd=1"
    return _let_in(int(host["user"]), "/dev/userfaultfd")


def _let_in(user: int, device: str) -> str:
    # An entry for one user is the smaller change, but not every host has the program for it.
    return f"setfacl -m u:{user}:rw {device}" if shutil.which("setfacl") else f"chown {user} {device}"


def mend_pool(page_size: int, total: int) -> str:
    """Return the command that makes a pool of `total` huge pages of that size (bytes)."""
    return f"echo {total} > /sys/kernel/mm/hugepages/hugepages-{page_size // 1024}kB/nr_hugepages"


def _opening(host: Facts) -> Iterator[tuple[str, str, str | None]]:
    mend = mend_opening(host)
    if mend is not None:
        tried = "; ".join(way["refusal"] for way in host["userfaultfd"]["ways"] if way["refusal"] is not None)
        yield f"user {int(host['user'])} may not open a userfaultfd ({tried})", "every migration to this host", mend


def _features(host: Facts) -> Iterator[tuple[str, str, str | None]]:
    if host["userfaultfd"]["refusal"] is not None:
        return  # nothing could be asked
    for name, (consequence, since) in FEATURES.items():
        if not host["userfaultfd"]["features"].get(name):
            yield f"the kernel lacks {name}: Linux {since} has it", consequence, None


def _pools(host: Facts) -> Iterator[tuple[str, str, str | None]]:
    for pool in host["hugetlb_pools"]:
        total, free, promised = (int(pool[name] or 0) for name in ("nr", "free", "resv"))
        if free <= promised:
            size = format_size(int(pool["page_size"]))
            problem = f"no huge page of {size} is to be had: {total} there, {free} free, {promised} promised"
            yield problem, "guests on such pages", mend_pool(int(pool["page_size"]), total + 1)


def _kvm(host: Facts) -> Iterator[tuple[str, str, str | None]]:
    kvm = host["kvm"]
    if kvm["refusal"] is None:
        return
    modules = {"GenuineIntel": "modprobe kvm_intel", "AuthenticAMD": "modprobe kvm_amd"}
    mend = modules.get(host["processor"]) if kvm["device"] is None else _let_in(int(host["user"]), "/dev/kvm")
    yield f"no virtual machine can be made: {kvm['refusal']}", "guests run by KVM", mend


def _openssl(host: Facts) -> Iterator[tuple[str, str, str | None]]:
    openssl = host["openssl"]
    if openssl["refusal"] is not None:
        yield f"OpenSSL 3 cannot be loaded: {openssl['refusal']}", "encrypted connections", "apt-get install libssl3"


def _clock(host: Facts) -> Iterator[tuple[str, str, str | None]]:
    clock = host["clock_source"]
    if clock["current"] not in SLOW_CLOCKS:
        return
    better = next(
        (one for one in ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page") if one in clock["available"]), None
    )
    mend = f"echo {better} > {CLOCK}" if better is not None else None
    yield f"the clock source {clock['current']} is slow to read", "the latency of every fault", mend
