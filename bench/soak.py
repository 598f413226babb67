"""An hour of what people do, with reconnects: memory of every process must stay flat, and everything must hold.

Memory is sampled all the time. The first third is warming up: pools, caches and tables of memory fill. From then on a
line is fitted; a part that gains more than a tenth of its size, and more than a few megabytes, along that line is
growing, and fails the run. Minutes tell little: what fills once, such as pools, still fills then.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import uvloop

from bench.instance import Instance, own_instance
from bench.member import EVERYTHING, Member
from bench.report import percentile, publish
from bench.rooms import check, settle
from bench.usage import Use, cpu_between, used

SAMPLE_SECONDS = 10.0
LEAST_GROWTH = 8 * 2**20
"""Bytes below which nothing is said to grow: one more arena of the allocator."""


@dataclass
class Samples:
    """Memory of its own of each part over time, in bytes by seconds."""

    times: list[float] = field(default_factory=list)
    sizes: dict[str, list[int]] = field(default_factory=dict)

    def take(self, now: float, uses: dict[str, Use]) -> None:
        self.times.append(now)
        for name, use in uses.items():
            self.sizes.setdefault(name, []).append(use.own)

    def growth(self, name: str) -> float:
        """Bytes an hour, by the least squares over the last two thirds."""
        begin = len(self.times) // 3
        times, sizes = self.times[begin:], self.sizes[name][begin:]
        if len(times) < 3:
            return 0.0
        mean_time, mean_size = sum(times) / len(times), sum(sizes) / len(sizes)
        spread = sum((at - mean_time) ** 2 for at in times)
        together = sum((at - mean_time) * (size - mean_size) for at, size in zip(times, sizes, strict=True))
        return 3600 * together / spread

    def is_flat(self, name: str, share: float) -> bool:
        """Whether what it gained over the last two thirds, by the line, is less than `share` of what it has."""
        hours = (self.times[-1] - self.times[len(self.times) // 3]) / 3600
        return self.growth(name) * hours < max(LEAST_GROWTH, share * self.sizes[name][-1])


async def _sample(instance: Instance, samples: Samples, stop: asyncio.Event) -> None:
    while not stop.is_set():
        samples.take(time.monotonic(), used(instance))
        try:
            async with asyncio.timeout(SAMPLE_SECONDS):
                await stop.wait()
        except TimeoutError:
            continue


async def _reconnect_at_random(members: list[Member], url: str, every: float, stop: asyncio.Event) -> int:
    """Each member, in turn, goes away and comes back with its cursor."""
    count = 0
    while not stop.is_set():
        await asyncio.sleep(every)
        member = random.choice(members)
        if member.socket is not None:
            await member.socket.stop()
            member.connect(url)
            count += 1
    return count


def _rows(samples: Samples, cpu: dict[str, float], share: float) -> list[dict[str, Any]]:
    return [
        {
            "part": name,
            "first MiB": sizes[0] / 2**20,
            "last MiB": sizes[-1] / 2**20,
            "most MiB": max(sizes) / 2**20,
            "MiB an hour": samples.growth(name) / 2**20,
            "CPU s": cpu[name],
            "flat": "yes" if samples.is_flat(name, share) else "NO",
        }
        for name, sizes in samples.sizes.items()
    ]


async def _measure(arguments: argparse.Namespace) -> int:
    samples = Samples()
    with own_instance(WHISPR_MESSAGING_WORKERS=str(arguments.workers)) as instance:
        rooms = await settle(instance.url, arguments.devices)
        members = [member for room in rooms for member in room]
        url = instance.socket_url(direct=False)
        for member in members:
            member.connect(url)
        stop, begun, before = asyncio.Event(), time.monotonic(), used(instance)
        acting = [
            asyncio.create_task(member.act_until(stop, arguments.pause, EVERYTHING)) for member in members
        ]
        watching = asyncio.create_task(_sample(instance, samples, stop))
        coming = asyncio.create_task(_reconnect_at_random(members, url, arguments.reconnect, stop))
        await asyncio.sleep(arguments.minutes * 60)
        stop.set()
        await asyncio.wait_for(asyncio.gather(*acting, watching), 60)
        reconnects = await coming
        cpu = cpu_between(before, used(instance))
        # The last scheduled messages have yet to come due.
        await asyncio.sleep(25)
        wrong, stored = await check(instance.url, rooms)
        minutes = (time.monotonic() - begun) / 60
        growing = [name for name in samples.sizes if not samples.is_flat(name, arguments.share)]
        instance.keep_logs = bool(wrong or growing)
        for member in members:
            await member.close()
    latencies = sorted(second * 1000 for member in members for second in member.latencies)
    done = sum((member.done for member in members), Counter[str]())
    publish(
        "soak",
        f"{len(members)} devices, {minutes:.1f} min, {done.total():,} things done ({done['send']:,} messages, "
        f"{done['edit']:,} edits), {reconnects:,} reconnects, {stored:,} events; through the gateway; acknowledged after "
        f"{percentile(latencies, 0.5):.1f} ms (P50), {percentile(latencies, 0.99):.1f} ms (P99)",
        _rows(samples, cpu, arguments.share),
        done=dict(done),
        wrong=wrong[:50],
        growing=growing,
    )
    for line in [*wrong[:50], *(f"{name} grows" for name in growing)]:
        print("WRONG", line)
    return 1 if wrong or growing or not done["send"] else 0


def main(argv: list[str]) -> int:
    """`whispr bench soak [--minutes M] [--devices N] [--workers W]`; status 1 when memory grows or a promise is broken."""
    parser = argparse.ArgumentParser(prog="whispr bench soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1, help="messaging processes")
    parser.add_argument("--pause", type=float, default=0.5, help="mean seconds between a device's doings")
    parser.add_argument(
        "--reconnect", type=float, default=0.5, help="seconds between reconnects of some device"
    )
    parser.add_argument("--share", type=float, default=0.1, help="growth that is still flat")
    return uvloop.run(_measure(parser.parse_args(argv)))
