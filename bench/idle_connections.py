"""Memory per joined connection: devices that joined their user topic and a conversation and then only beat.

Resident memory of the messaging process before and after, divided by the connections; and the processor it uses at
rest while every connection sends a heartbeat each 30 seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from functools import partial

import httpx
import psutil
import uvloop

from bench.instance import Instance, own_instance
from bench.load import Device, Person, connect, gather_bounded, open_conversation, register_many
from bench.report import publish

HEARTBEAT = b'[null,"h","phoenix","heartbeat",{}]'
HEARTBEAT_SECONDS = 30.0
PER_ADDRESS = 10_000


async def _join(url: str, number: int, person: Person, conversation: str, joined: list[Device]) -> None:
    device = await connect(url, person.token, f"127.0.{1 + number // PER_ADDRESS}.1")
    await device.join(f"user:{person.user_id}", ref="1")
    await device.join(f"conversation:{conversation}", ref="2")
    joined.append(device)


async def _beat(devices: list[Device], seconds: float) -> None:
    """Heartbeats of all devices, spread evenly."""
    loop = asyncio.get_running_loop()
    started, sent = loop.time(), 0
    while (elapsed := loop.time() - started) < seconds:
        wanted = int(elapsed / HEARTBEAT_SECONDS * len(devices))
        for number in range(sent, wanted):
            devices[number % len(devices)].send(HEARTBEAT)
        sent = max(sent, wanted)
        await asyncio.sleep(0.1)


async def _people(instance: Instance, count: int) -> list[tuple[Person, str]]:
    people = await register_many(instance.url, count)
    async with httpx.AsyncClient(timeout=60) as http:
        conversations = await gather_bounded(
            [
                partial(open_conversation, http, instance.url, one, [two])
                for one, two in zip(people[::2], people[1::2], strict=True)
            ]
        )
    return [(person, conversations[number // 2]) for number, person in enumerate(people)]


async def _measure(arguments: argparse.Namespace) -> None:
    with own_instance() as instance:
        people = await _people(instance, arguments.people)
        url = instance.socket_url(direct=True)
        process = psutil.Process(instance.service("messaging")["pid"])
        before = process.memory_info().rss
        started = time.monotonic()
        devices: list[Device] = []
        # Those that have joined must beat while the rest still joins, or the server would close them as dead.
        beating = asyncio.create_task(_beat(devices, 3600))
        await gather_bounded(
            [
                partial(_join, url, number, *people[number % len(people)], devices)
                for number in range(arguments.connections)
            ],
            64,
        )
        joined = time.monotonic() - started
        beating.cancel()
        # Replies, first presence and garbage of joining settle before memory is read.
        await _beat(devices, 10)
        after = process.memory_info().rss
        process.cpu_percent()
        await _beat(devices, arguments.seconds)
        cpu = process.cpu_percent()
        alive = sum(not device.closed.done() for device in devices)
    publish(
        "idle-connections",
        f"{len(people):,} people; each connection joined user:ID and a conversation, a heartbeat each 30 s; "
        "resident memory of the one messaging process",
        [
            {
                "connections": len(devices),
                "alive": alive,
                "joined in s": joined,
                "before MiB": before / 2**20,
                "after MiB": after / 2**20,
                "KiB a connection": (after - before) / 1024 / len(devices),
                "CPU at rest %": cpu,
            }
        ],
    )


def main(argv: list[str]) -> int:
    """`whispr bench idle-connections [--connections N] [--people N] [--seconds S]`."""
    parser = argparse.ArgumentParser(prog="whispr bench idle-connections", description=__doc__)
    parser.add_argument(
        "--connections", type=int, default=19_500, help="this process may have 20,000 descriptors"
    )
    parser.add_argument(
        "--people", type=int, default=10_000, help="distinct people; devices beyond share their tokens"
    )
    parser.add_argument("--seconds", type=float, default=30, help="how long to watch the processor at rest")
    uvloop.run(_measure(parser.parse_args(argv)))
    return 0
