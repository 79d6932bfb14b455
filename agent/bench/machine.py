"""The machine a bench runs on: what it is, and whether anybody else used it while a run was measured.

/proc enters; an environment for the record and, for the time between two samples, a `Load` that can say "disturbed".
"""

from __future__ import annotations

import os
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from postcopy import __version__
from postcopy.kernel.cgroups import memory_left

# Shares of all CPUs over a run. Below this, medians of five runs hold still; measured with one core kept busy at will.
OTHERS_MAX = 0.08
STEAL_MAX = 0.02

THP = Path("/sys/kernel/mm/transparent_hugepage")

_TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Load:
    """What else went on during a run: CPU shares of the whole machine (0 to 1), load averages, switches of ours."""

    others: float
    steal: float
    before: float
    after: float
    involuntary_switches: int

    @property
    def disturbed(self) -> bool:
        """Whether figures of this run should not be trusted by themselves."""
        return self.others > OTHERS_MAX or self.steal > STEAL_MAX


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the machine's counters, in seconds of CPU."""

    at: float
    busy: float
    steal: float
    own: float
    switches: int
    load: float

    @classmethod
    def take(cls) -> Sample:
        """Look now. `own` counts this process and those of its children that have ended."""
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        user, nice, system, _idle, _iowait, _irq, _softirq, steal = (int(field) * _TICK for field in fields[:8])
        own, switches = 0.0, 0
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            usage = resource.getrusage(who)
            own += usage.ru_utime + usage.ru_stime
            switches += usage.ru_nivcsw
        # Interrupts are in nobody's own time, so they are left out on both sides: most are for our own packets.
        busy = user + nice + system
        return cls(time.monotonic(), busy, steal, own, switches, os.getloadavg()[0])

    def until(self, later: Sample) -> Load:
        """Return what went on between this sample and a later one."""
        capacity = max(_TICK, (later.at - self.at) * (os.cpu_count() or 1))
        others = (later.busy - self.busy) - (later.own - self.own)
        return Load(
            others=max(0.0, others / capacity),
            steal=max(0.0, (later.steal - self.steal) / capacity),
            before=self.load,
            after=later.load,
            involuntary_switches=later.switches - self.switches,
        )


def environment(pinning: str) -> dict[str, object]:
    """Return what the figures were made on."""
    return {
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_model": _cpu_model(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "virtual": "hypervisor" in _cpu_flags(),
        "pinning": pinning,
        "shmem_huge_pages": chosen(THP / "shmem_enabled"),
        "tls": False,
        "version": __version__,
    }


def available_bytes() -> int:
    """Return how much memory could be had now, of this machine and of what its cgroups grant, without any swap."""
    return min([_meminfo("MemAvailable") * 1024, *(left for left, _ in memory_left())])


def chosen(setting: Path) -> str:
    """Return the word in brackets of a kernel setting that lists its choices, "" where there is no such setting."""
    try:
        text = setting.read_text(encoding="ascii")
    except OSError:
        return ""
    return text.partition("[")[2].partition("]")[0]


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0


def _cpuinfo(name: str) -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.machine()


def _cpu_flags() -> list[str]:
    return _cpuinfo("flags").split()
