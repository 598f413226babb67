"""Up to 100,000 joined connections that only beat: memory and processor each costs, then messages through them.

Each connection joins `user:ID` and a conversation with one other connection. Memory is that of all messaging processes before and after, divided
by the connections; the processor is counted for every part of the instance.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from typing import Any

import uvloop

from bench.crowd import Crowd, Seat, address_of, run_offer, spread
from bench.fleet import Fleet
from bench.instance import Instance, own_instance
from bench.load import register_many
from bench.prepared import make_conversations
from bench.report import percentile, publish
from bench.stream import Offer
from bench.usage import cpu_between, parts, used

PER_PROCESS = 16_000
"""Connections of one generator process, of the 20,000 descriptors it may have."""

PER_WORKER = 15_000
"""Connections of one messaging process: the kernel deals them out by hash, not evenly."""


async def _seats(instance: Instance, people: int, connections: int) -> list[Seat]:
    """Each two connections have a conversation of their own: the first sends, the second listens."""
    registered = await register_many(instance.url, people - people % 2)
    pairs = [
        (registered[2 * number % len(registered)], registered[(2 * number + 1) % len(registered)])
        for number in range(connections // 2)
    ]
    conversations = await make_conversations(instance, pairs)
    seats = []
    for number, ((one, two), conversation) in enumerate(zip(pairs, conversations, strict=True)):
        seats.append(Seat(one, conversation, address_of(2 * number), sends=True, devices=[two.device_id]))
        seats.append(Seat(two, conversation, address_of(2 * number + 1)))
    return seats


async def _measure(arguments: argparse.Namespace) -> int:
    workers = arguments.workers or -(-arguments.connections // PER_WORKER)
    with own_instance(
        WHISPR_MESSAGING_WORKERS=str(workers), WHISPR_AUTH_ACCESS_TOKEN_SECONDS="3600"
    ) as instance:
        seats = await _seats(instance, arguments.people, arguments.connections)
        processes = -(-len(seats) // PER_PROCESS)
        shares = spread(seats, processes)
        url = instance.socket_url(direct=True)
        given = [(url, share, index, processes) for index, share in enumerate(shares)]
        async with Fleet(Crowd, given) as fleet:
            row = await _joined(instance, fleet, arguments, len(seats))
            row |= await _at_rest(instance, fleet, arguments.seconds)
            messages = await _messages(instance, fleet, arguments)
            ended = sum(await fleet.call("ended"), Counter[int]())
    if ended:
        row["closed, by code"] = ", ".join(f"{code}: {count}" for code, count in sorted(ended.items()))
    publish(
        "idle-connections",
        f"{arguments.people:,} people; each connection joined user:ID and a conversation, a heartbeat each 30 s; "
        f"{row.pop('messaging processes')} messaging processes, {processes} generator processes, past the gateway",
        [row],
        messages=messages,
    )
    if messages:
        publish(
            "idle-connections",
            f"messages through {len(seats):,} connections; each delivered to the other connection of its conversation",
            messages,
        )
    return 0 if row["alive"] == row["connections"] else 1


async def _joined(
    instance: Instance, fleet: Fleet, arguments: argparse.Namespace, connections: int
) -> dict[str, Any]:
    before = used(instance)
    started = time.monotonic()
    times = await fleet.call("join", max(1, arguments.width // len(fleet)), True)
    seconds = time.monotonic() - started
    # Replies, first presence and garbage of joining settle before memory is read.
    await asyncio.sleep(10)
    after = used(instance)
    cpu = {name: 1000 * spent / connections for name, spent in cpu_between(before, after).items()}
    latencies = sorted(time for share in times for time in share)
    return {
        "connections": connections,
        "alive": sum(await fleet.call("alive")),
        "messaging processes": len(parts(instance)["messaging"]),
        "joined in s": seconds,
        "join P99 ms": percentile(latencies, 0.99),
        "join CPU ms each": sum(cpu.values()),
        **{f"of {name}": spent for name, spent in cpu.items() if spent >= 0.01},
        "RSS KiB each": (after["messaging"].rss - before["messaging"].rss) / 1024 / connections,
        "PSS KiB each": (after["messaging"].pss - before["messaging"].pss) / 1024 / connections,
        "messaging MiB": after["messaging"].pss / 2**20,
    }


async def _at_rest(instance: Instance, fleet: Fleet, seconds: float) -> dict[str, Any]:
    before, started = used(instance), time.monotonic()
    await asyncio.sleep(seconds)
    spent = cpu_between(before, used(instance))
    elapsed = time.monotonic() - started
    return {
        "rest CPU %": 100 * sum(spent.values()) / elapsed,
        "of messaging %": 100 * spent["messaging"] / elapsed,
        "alive": sum(await fleet.call("alive")),
    }


async def _messages(instance: Instance, fleet: Fleet, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Twice the same: what a worker must ask for at a conversation's first message is at hand at the next."""
    if not arguments.rate:
        return []
    await run_offer(fleet, Offer(50, 2, 1))
    rows = []
    for tag, which in ((2, "first of each conversation"), (3, "later ones")):
        offer = Offer(arguments.rate, arguments.message_seconds, tag)
        before = used(instance)
        row = await run_offer(fleet, offer)
        spent = cpu_between(before, used(instance))
        row["CPU ms each"] = 1000 * sum(spent.values()) / offer.total
        row |= {f"of {name}": 1000 * cpu / offer.total for name, cpu in spent.items()}
        rows.append({"messages": which, **row})
    return rows


def main(argv: list[str]) -> int:
    """`whispr bench idle-connections [--connections N] [--people N] [--workers W]`; status 1 when one was lost."""
    parser = argparse.ArgumentParser(prog="whispr bench idle-connections", description=__doc__)
    parser.add_argument("--connections", type=int, default=19_500)
    parser.add_argument(
        "--people", type=int, default=10_000, help="distinct people; devices beyond share their tokens"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="messaging processes; 0: as many as are needed"
    )
    parser.add_argument("--width", type=int, default=512, help="joins under way at once")
    parser.add_argument("--seconds", type=float, default=30, help="how long to watch the processor at rest")
    parser.add_argument("--rate", type=float, default=1_000, help="messages a second afterwards; 0: none")
    parser.add_argument("--message-seconds", type=float, default=10)
    return uvloop.run(_measure(parser.parse_args(argv)))
