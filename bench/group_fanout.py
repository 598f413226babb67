"""Messages to groups of 100 with everybody joined: deliveries a second, and how late they are.

One member of each group sends a shared ciphertext; the others' 99 connections are counted. Rates are of messages,
offered and not asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
from functools import partial
from typing import Any

import httpx
import uvloop

from bench.crowd import Crowd, Seat, address_of, run_offer, spread
from bench.fleet import Fleet
from bench.instance import Instance, own_instance
from bench.load import Person, gather_bounded, open_conversation, register_many
from bench.report import publish
from bench.stream import Offer
from bench.usage import cpu_between, used

DEFAULT_RATES = [100.0, 200.0, 300.0, 400.0, 500.0, 600.0]
LIMIT_MS = 300.0


async def _seats(instance: Instance, people: list[Person], groups: int, size: int) -> list[Seat]:
    """Groups of `size`, each of other people where there are enough; the first of each sends."""
    starts = [number * size % len(people) for number in range(groups)]
    wrapped = people + people
    rooms = [wrapped[start : start + size] for start in starts]
    async with httpx.AsyncClient(timeout=60) as http:
        conversations = await gather_bounded(
            [partial(open_conversation, http, instance.url, room[0], room[1:]) for room in rooms], 4
        )
    return [
        Seat(person, conversation, address_of(number * size + place), sends=place == 0)
        for number, (room, conversation) in enumerate(zip(rooms, conversations, strict=True))
        for place, person in enumerate(room)
    ]


async def _offered(instance: Instance, fleet: Fleet, offer: Offer) -> dict[str, Any]:
    gc.collect()
    before = used(instance)
    row = await run_offer(fleet, offer)
    spent = cpu_between(before, used(instance))
    row["messaging CPU s"] = spent["messaging"]
    row["all services CPU s"] = sum(spent.values())
    return row


async def _measure(arguments: argparse.Namespace) -> None:
    with own_instance(
        WHISPR_MESSAGING_WORKERS=str(arguments.workers), WHISPR_AUTH_ACCESS_TOKEN_SECONDS="3600"
    ) as instance:
        people = await register_many(instance.url, max(arguments.people, arguments.size))
        seats = await _seats(instance, people, arguments.groups, arguments.size)
        url = instance.socket_url(direct=True)
        given = [
            (url, share, index, arguments.generators)
            for index, share in enumerate(spread(seats, arguments.generators))
        ]
        rows: list[dict[str, Any]] = []
        async with Fleet(Crowd, given) as fleet:
            await fleet.call("join", 100, False)
            await asyncio.sleep(5)
            await run_offer(fleet, Offer(20, 2, 1))
            for number, rate in enumerate(arguments.rates):
                rows.append(await _offered(instance, fleet, Offer(rate, arguments.seconds, 2 + number)))
                if rows[-1]["delivery P99 ms"] > 10 * LIMIT_MS or rows[-1]["lost"]:
                    break
    carried = [
        row for row in rows if row["delivery P99 ms"] < LIMIT_MS and not row["lost"] and not row["refused"]
    ]
    publish(
        "group-fanout",
        f"{arguments.groups} groups of {arguments.size}, all joined, {arguments.seconds:g} s a rate; "
        f"{arguments.workers} messaging processes, {arguments.generators} generator processes, PostgreSQL (fsync on) and "
        "Valkey on the same machine, past the gateway",
        rows,
        deliveries_below_300_ms=max((row["deliveries/s"] for row in carried), default=0),
    )


def main(argv: list[str]) -> int:
    """`whispr bench group-fanout [--rates …] [--groups N] [--size N] [--workers W]`."""
    parser = argparse.ArgumentParser(prog="whispr bench group-fanout", description=__doc__)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=DEFAULT_RATES, help="messages a second to offer"
    )
    parser.add_argument("--seconds", type=float, default=10, help="length of each rate")
    parser.add_argument("--groups", type=int, default=20)
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--people", type=int, default=400, help="distinct people, in several groups each")
    parser.add_argument("--workers", type=int, default=1, help="messaging processes")
    parser.add_argument("--generators", type=int, default=1, help="generator processes")
    uvloop.run(_measure(parser.parse_args(argv)))
    return 0
