"""Devices do everything people do while processes are killed with -9 at random; afterwards every promise is checked.

They send, edit, delete, react, pin, schedule, and add and remove people. Checked for each conversation: whatever was
acknowledged is in force, once; `seq` has no holes; every device, whatever it lived through, was given every event exactly
once and in order; and what its events led to is what a fresh fetch brings.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter

import uvloop

from bench.instance import Instance, own_instance
from bench.member import EVERYTHING
from bench.report import percentile, publish
from bench.rooms import Room, check, settle
from bench.usage import parts

TARGETS = ("messaging", "postgres", "valkey", "auth", "user")
CALM_SECONDS = 20.0
"""Devices go on until everything runs again, so that what was in flight is acknowledged and not given up."""


class Killer:
    """Kills processes at random, until it has killed `most` or the time is up."""

    def __init__(self, instance: Instance, arguments: argparse.Namespace) -> None:
        self._instance = instance
        self._pauses = (arguments.least, arguments.most)
        self._most = arguments.kills
        self._deadline = time.monotonic() + arguments.minutes * 60 if not arguments.kills else float("inf")
        self.kills: Counter[str] = Counter()

    async def run(self) -> None:
        """Returns when it is done."""
        while time.monotonic() < self._deadline and not 0 < self._most <= self.kills.total():
            await asyncio.sleep(random.uniform(*self._pauses))
            target = random.choice(TARGETS)
            # One of the workers, where there are several; run.json has those that are running now.
            pid = random.choice(parts(self._instance)[target])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.kills[target] += 1
            if self.kills.total() % 100 == 0:
                print(f"{self.kills.total()} kills", flush=True)


async def _live_through(rooms: list[Room], url: str, arguments: argparse.Namespace, killer: Killer) -> None:
    members = [member for room in rooms for member in room]
    for member in members:
        member.connect(url)
    stop = asyncio.Event()
    acting = [asyncio.create_task(member.act_until(stop, arguments.pause, EVERYTHING)) for member in members]
    await killer.run()
    await asyncio.sleep(CALM_SECONDS)
    stop.set()
    await asyncio.wait_for(asyncio.gather(*acting), 60)
    # The last scheduled messages have yet to come due.
    await asyncio.sleep(CALM_SECONDS)


async def _measure(arguments: argparse.Namespace) -> int:
    with own_instance(WHISPR_MESSAGING_WORKERS=str(arguments.workers)) as instance:
        rooms = await settle(instance.url, arguments.devices)
        members = [member for room in rooms for member in room]
        killer = Killer(instance, arguments)
        began = time.monotonic()
        await _live_through(rooms, instance.socket_url(direct=arguments.direct), arguments, killer)
        minutes = (time.monotonic() - began) / 60
        wrong, stored = await check(instance.url, rooms)
        instance.keep_logs = bool(wrong)
        for member in members:
            await member.close()
    latencies = sorted(second * 1000 for member in members for second in member.latencies)
    done = sum((member.done for member in members), Counter[str]())
    refused = sum((member.refused for member in members), Counter[str]())
    publish(
        "chaos",
        f"{len(members)} devices in {len(rooms)} conversations, {minutes:.1f} min, a kill -9 every "
        f"{arguments.least:g}-{arguments.most:g} s, {arguments.workers} messaging processes; "
        f"{'past' if arguments.direct else 'through'} the gateway",
        [
            {
                "kills": killer.kills.total(),
                **{f"of {target}": killer.kills[target] for target in TARGETS},
                "acknowledged": done.total(),
                **{f"{name} done": done[name] for name in EVERYTHING},
                "overtaken": refused.total(),
                "events stored": stored,
                "events given to devices": sum(len(member.given) for member in members),
                "ack P50 ms": percentile(latencies, 0.5),
                "ack P99 ms": percentile(latencies, 0.99),
                "ack max s": percentile(latencies, 1) / 1000,
                "wrong": len(wrong),
            }
        ],
        wrong=wrong[:50],
        refused=dict(refused),
    )
    for line in wrong[:50]:
        print("WRONG", line)
    return 1 if wrong or not done["send"] else 0


def main(argv: list[str]) -> int:
    """`whispr bench chaos [--minutes M | --kills N] [--devices N] [--workers W]`; status 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="whispr bench chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kills", type=int, default=0, help="go on until so many, whatever --minutes says")
    parser.add_argument("--devices", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1, help="messaging processes")
    parser.add_argument("--pause", type=float, default=0.2, help="mean seconds between a device's doings")
    parser.add_argument("--least", type=float, default=2, help="least seconds between kills")
    parser.add_argument("--most", type=float, default=8, help="most seconds between kills")
    parser.add_argument("--direct", action="store_true", help="sockets past the gateway")
    return uvloop.run(_measure(parser.parse_args(argv)))
