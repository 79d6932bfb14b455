"""This host in plain values: everything that was tried, and the settings around it, as a map that JSON can carry.

In: nothing. Out: the map that `doctor` shows and that two agents exchange to compare their hosts. Sizes are bytes.
"""

from __future__ import annotations

import errno
import os
import platform
import resource
import stat
from pathlib import Path
from typing import Any

from postcopy.kernel.abi import Feature, Ioctl
from postcopy.kernel.hugetlb import POOLS
from postcopy.kernel.kvm import DEVICE as KVM_DEVICE
from postcopy.kernel.kvm import probe_kvm
from postcopy.kernel.memory_type import ModeGrant, TypeGrants
from postcopy.kernel.opening import DEVICE
from postcopy.kernel.probe import HostProbe, name_modes, probe_host
from postcopy.kernel.shmem import room

THP = Path("/sys/kernel/mm/transparent_hugepage")
CLOCK = Path("/sys/devices/system/clocksource/clocksource0")

Facts = dict[str, Any]


def describe_machine() -> Facts:
    """Try everything once and read every setting: milliseconds, and nothing stays behind."""
    probe = probe_host()
    available, limit = room()
    return {
        "kernel": probe.kernel,
        "architecture": platform.machine(),
        "processor": _processor(),
        "user": probe.user,
        "cpus": {"online": os.cpu_count() or 0, "allowed": len(os.sched_getaffinity(0))},
        "clock_source": {"current": _text(CLOCK / "current_clocksource"), "available": _words("available")},
        "memory": {"page_size": resource.getpagesize(), "available_bytes": available, "limited_by": limit},
        "memlock": _memlock(),
        "userfaultfd": _userfaultfd(probe),
        "memory_types": [_memory_type(grants) for grants in probe.types],
        "hugetlb_pools": _pools(),
        "transparent_huge_pages": {
            "anonymous": _chosen(THP / "enabled"),
            "shmem": _chosen(THP / "shmem_enabled"),
            "size_bytes": _number(THP / "hpage_pmd_size"),
        },
        "kvm": _kvm(),
    }


def _processor() -> str:
    """Return who made the processor, as x86 says it: "GenuineIntel", "AuthenticAMD"; empty elsewhere."""
    lines = (line.partition(":") for line in _text(Path("/proc/cpuinfo")).splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "vendor_id"), "")


def _memlock() -> Facts:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {"soft_bytes": _limit(soft), "hard_bytes": _limit(hard)}


def _userfaultfd(probe: HostProbe) -> Facts:
    known = {bit.name or hex(bit): bool(probe.features & bit) for bit in Feature}
    unknown = int(probe.features) & ~sum(Feature)
    return {
        "device": _device(DEVICE),
        "unprivileged_userfaultfd": probe.unprivileged_userfaultfd,
        "ways": [{"by": str(way.by), "refusal": way.refusal} for way in probe.ways],
        "refusal": probe.refusal,
        "features": known,
        "unknown_features": [bit for bit in range(64) if unknown >> bit & 1],
        "ioctls": _names(probe.ioctls),
    }


def _device(path: Path) -> Facts | None:
    """Return who may open a device by its file's mode, None where there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return {
        "path": str(path),
        "mode": f"{stat.S_IMODE(found.st_mode):04o}",
        "user": found.st_uid,
        "group": found.st_gid,
    }


def _memory_type(grants: TypeGrants) -> Facts:
    return {
        "name": grants.name,
        "page_size": grants.page_size,
        "modes": [_grant(one) for one in grants.modes],
        "reason": grants.reason,
    }


def _grant(grant: ModeGrant) -> Facts:
    granted = grant.ioctls is not None
    refused = {ioctl.name or hex(ioctl): answer for ioctl, answer in grant.refused.items()}
    return {
        "mode": name_modes(grant.modes),
        "ioctls": None if grant.ioctls is None else [name for name in _names(grant.ioctls) if name not in refused],
        "refused": refused,
        "untried": _names(grant.untried),
        "refusal": None if granted else errno.errorcode.get(grant.number, str(grant.number)),
    }


def _names(ioctls: Ioctl) -> list[str]:
    return [bit.name or hex(bit) for bit in ioctls]


def _pools() -> list[Facts]:
    """Return the counters of every pool, of each size that this machine has."""
    pools = []
    for folder in sorted(POOLS.glob("hugepages-*kB")):
        counts = {name: _number(folder / f"{name}_hugepages") for name in ("nr", "free", "resv", "surplus")}
        size = int(folder.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        pools.append({"page_size": size, "folder": str(folder), **counts})
    return sorted(pools, key=lambda pool: int(pool["page_size"] or 0))


def _kvm() -> Facts:
    probe = probe_kvm()
    return {
        "device": _device(KVM_DEVICE),
        "refusal": probe.refusal,
        "api_version": probe.api_version,
    }


# --- files of /proc and /sys, which may be absent ---------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _words(which: str) -> list[str]:
    return _text(CLOCK / f"{which}_clocksource").split()


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _chosen(path: Path) -> str:
    """Return the word in brackets of a file that shows every choice: "always [madvise] never"."""
    return _text(path).partition("[")[2].partition("]")[0]


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value
