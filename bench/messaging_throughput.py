"""1:1 messages a second: signed, per-device envelopes, acknowledged after commit, delivered to the other device.

PostgreSQL (fsync on), Valkey, every service and this load generator share the machine. Rates are offered, not asked
for: a message's clock starts when it was due, so a server that falls behind shows it (no coordinated omission).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import httpx
import uvloop

from bench.instance import Instance, own_instance
from bench.load import (
    Device,
    Person,
    client_frame,
    connect,
    gather_bounded,
    open_conversation,
    register_many,
    signed_payload,
)
from bench.report import percentile, publish

DEFAULT_RATES = [2_000, 5_000, 7_500, 10_000, 12_500, 15_000, 20_000]
LIMIT_MS = 100.0

_QUOTE = ord('"')
# Of ["1",null,"conversation:ID","new_message",…
_EVENT = slice(63, 74)


@dataclass
class End:
    """One person's end of a pair. Its topic is joined as join_ref `topic_ref`."""

    person: Person
    other: Person
    conversation: str
    device: Device
    frames: list[bytes] = field(default_factory=list)


class Run:
    """One offered rate: what was due when, and when it was acknowledged and delivered.

    The generator takes its share of the machine that is measured, so it parses nothing: messages are numbered in the
    last eight digits of their client ids, and frames are told apart by where their parts stand.
    """

    def __init__(self, ends: list[End], rate: int, seconds: float) -> None:
        self.ends = ends
        self.rate = rate
        self.total = int(rate * seconds)
        self.due = [0.0] * self.total
        self.acknowledged: list[float] = []
        self.delivered: list[float] = []
        self.refused = 0
        self._loop = asyncio.get_running_loop()

    def prepare(self) -> None:
        """Sign and encode every message before the clock starts; message i belongs to end i mod ends."""
        run = uuid4().int >> 32 << 32
        for number in range(self.total):
            end = self.ends[number % len(self.ends)]
            _, payload = signed_payload(
                end.person, end.conversation, [end.other.device_id], client_id=UUID(int=run + number)
            )
            end.frames.append(
                client_frame(
                    b'["1","%d","conversation:%s","new_message",%s]'
                    % (number, end.conversation.encode(), payload)
                )
            )
        for index, end in enumerate(self.ends):
            end.device.on_frame = partial(self._on_frame, index)

    def _on_frame(self, index: int, data: bytes) -> None:
        now = self._loop.time()
        if data[5] == _QUOTE:
            # ["1","NUMBER","conversation:…","phx_reply",{"status":…; a push has null for its ref.
            if data.find(b'"status":"ok"', 70, 120) > 0:
                self.acknowledged.append(now - self.due[int(data[6 : data.index(_QUOTE, 6)])])
            else:
                self.refused += 1
        elif data[_EVENT] == b"new_message":
            end_of_id = data.index(b'"client_id":"', 80) + 49
            number = int(data[end_of_id - 8 : end_of_id], 16)
            # Senders see their own messages too; a delivery is what reaches the other person.
            if number % len(self.ends) != index:
                self.delivered.append(now - self.due[number])

    async def offer(self) -> float:
        """Send everything when it is due; the seconds until the last delivery."""
        started = self._loop.time() + 0.05
        position = [0] * len(self.ends)
        sent = 0
        while sent < self.total:
            now = self._loop.time()
            wanted = min(self.total, int((now - started) * self.rate) + 1) if now >= started else 0
            while sent < wanted:
                which = sent % len(self.ends)
                end = self.ends[which]
                self.due[sent] = started + sent / self.rate
                end.device.send_raw(end.frames[position[which]])
                position[which] += 1
                sent += 1
            await asyncio.sleep(0.001)
        patience = self._loop.time() + 15
        while len(self.delivered) < self.total - self.refused and self._loop.time() < patience:
            await asyncio.sleep(0.01)
        return self._loop.time() - started


def _row(run: Run, elapsed: float) -> dict[str, Any]:
    acknowledged = sorted(second * 1000 for second in run.acknowledged)
    delivered = sorted(second * 1000 for second in run.delivered)
    return {
        "offered/s": run.rate,
        "delivered/s": round(len(delivered) / elapsed),
        "lost": run.total - run.refused - len(delivered),
        "refused": run.refused,
        "ack P50 ms": percentile(acknowledged, 0.5),
        "ack P99 ms": percentile(acknowledged, 0.99),
        "delivery P50 ms": percentile(delivered, 0.5),
        "delivery P99 ms": percentile(delivered, 0.99),
    }


async def _pairs(instance: Instance, count: int, direct: bool) -> list[End]:
    people = await register_many(instance.url, count * 2)
    couples = list(zip(people[::2], people[1::2], strict=True))
    async with httpx.AsyncClient(timeout=60) as http:
        conversations = await gather_bounded(
            [partial(open_conversation, http, instance.url, one, [two]) for one, two in couples]
        )
    url = instance.socket_url(direct=direct)
    ends = []
    for (one, two), conversation in zip(couples, conversations, strict=True):
        for person, other in ((one, two), (two, one)):
            device = await connect(url, person.token)
            await device.join(f"conversation:{conversation}", ref="1")
            ends.append(End(person, other, conversation, device))
    return ends


async def _measure(arguments: argparse.Namespace) -> None:
    with own_instance() as instance:
        ends = await _pairs(instance, arguments.pairs, arguments.direct)
        rows: list[dict[str, Any]] = []
        await _one(ends, 1_000, 2)
        for rate in arguments.rates:
            rows.append(await _one(ends, rate, arguments.seconds))
            if rows[-1]["delivery P99 ms"] > 10 * LIMIT_MS or rows[-1]["lost"]:
                break
    carried = [
        row for row in rows if row["delivery P99 ms"] < LIMIT_MS and not row["lost"] and not row["refused"]
    ]
    best = max((row["delivered/s"] for row in carried), default=0)
    way = "straight to messaging's socket port" if arguments.direct else "through the gateway"
    publish(
        "messaging-throughput",
        f"{arguments.pairs} pairs, both ways, {arguments.seconds:g} s a rate, {way}; one messaging process, "
        "PostgreSQL (fsync on), Valkey and load generator on the same machine",
        rows,
        highest_rate_below_100_ms=best,
    )


async def _one(ends: list[End], rate: int, seconds: float) -> dict[str, Any]:
    for end in ends:
        end.frames.clear()
    run = Run(ends, rate, seconds)
    run.prepare()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        elapsed = await run.offer()
    finally:
        gc.enable()
    return _row(run, elapsed)


def main(argv: list[str]) -> int:
    """`whispr bench messaging-throughput [--rates …] [--seconds S] [--pairs N] [--direct]`."""
    parser = argparse.ArgumentParser(prog="whispr bench messaging-throughput", description=__doc__)
    parser.add_argument(
        "--rates", type=int, nargs="+", default=DEFAULT_RATES, help="messages a second to offer"
    )
    parser.add_argument("--seconds", type=float, default=10, help="length of each rate")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--direct", action="store_true", help="past the gateway, to messaging's own port")
    uvloop.run(_measure(parser.parse_args(argv)))
    return 0
