"""What the processes of an instance use: processor seconds, resident and proportional memory, by part."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.instance import Instance


@dataclass(frozen=True, slots=True)
class Use:
    """Seconds of processor so far, and bytes of memory now.

    `pss` counts a page shared by n processes as 1/n; `own` is the part of it that is neither a file nor memory made to
    be shared, such as PostgreSQL's page cache, which fills up to its bound whatever happens.
    """

    cpu: float
    rss: int
    pss: int
    own: int

    def __add__(self, other: Use) -> Use:
        return Use(self.cpu + other.cpu, self.rss + other.rss, self.pss + other.pss, self.own + other.own)


NOTHING = Use(0.0, 0, 0, 0)


def parts(instance: Instance) -> dict[str, list[int]]:
    """The process ids of each part, as `run.json` has them now; workers count to their service."""
    run = instance.run
    found: dict[str, list[int]] = {}
    for name, service in run["services"].items():
        found[name] = sorted({service["pid"], *(worker["pid"] for worker in service.get("workers", ()))})
    for name in ("postgres", "valkey", "gateway"):
        if run.get(name):
            found[name] = [run[name]["pid"]]
    return found


def used(instance: Instance) -> dict[str, Use]:
    """What each part uses, its children included."""
    return {name: _sum(pids) for name, pids in parts(instance).items()}


def cpu_between(before: dict[str, Use], after: dict[str, Use]) -> dict[str, float]:
    """Seconds of processor each part used between two looks."""
    return {name: max(0.0, use.cpu - before.get(name, NOTHING).cpu) for name, use in after.items()}


def _sum(pids: Iterable[int]) -> Use:
    total = NOTHING
    for pid in pids:
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.Error, OSError):
                    total += _of(one)
    return total


def _of(process: psutil.Process) -> Use:
    # Children that have ended count too: PostgreSQL's checkpoints and connections come and go.
    times = process.cpu_times()
    cpu = times.user + times.system + times.children_user + times.children_system
    sizes = _proportional(process.pid)
    return Use(cpu, process.memory_info().rss, sizes["Pss"], sizes["Pss_Anon"])


def _proportional(pid: int) -> dict[str, int]:
    """Bytes by the names of the kernel."""
    sizes = {"Pss": 0, "Pss_Anon": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in sizes:
            sizes[name] = int(value.split()[0]) * 1024
    return sizes
