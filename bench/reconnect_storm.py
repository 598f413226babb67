"""All connections drop and come back at once, with cursors, while messages go on: until everybody has everything.

Each listener has a 1:1 conversation with one of a few senders, who stay and send all the time. A listener that cannot
come back tries again after a pause that grows, as clients do. Checked for each conversation: every event reached its
listener once and in order, from before the drop until the end.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import msgspec
import uvloop

from bench.crowd import HEARTBEAT, address_of
from bench.fleet import Fleet
from bench.instance import Instance, own_instance
from bench.load import (
    Device,
    Person,
    connect,
    gather_bounded,
    open_conversation,
    register_many,
    signed_payload,
)
from bench.report import percentile, publish
from bench.usage import cpu_between, used

PER_PROCESS = 16_000
PER_WORKER = 15_000
PER_SENDER = 500
"""Conversations of one sender; a socket may join 1,000."""


class _Event(msgspec.Struct):
    seq: int


class _Page(msgspec.Struct):
    events: list[_Event]
    more: bool
    epoch: str | None = None


class _Seq(msgspec.Struct):
    seq: int


_frame = msgspec.json.Decoder(tuple[Any, Any, str, str, msgspec.Raw])
_page = msgspec.json.Decoder(_Page)
_seq = msgspec.json.Decoder(_Seq)


@dataclass(slots=True)
class Listener:
    """One person's device in one conversation; `seqs` is every event it was given, in the order of arrival."""

    person: Person
    conversation: str
    address: str
    seqs: list[int] = field(default_factory=list)
    epoch: str | None = None
    device: Device | None = None
    attempts: int = 0

    def take(self, data: bytes) -> None:
        """A pushed frame; only messages count."""
        _, _, _, event, payload = _frame.decode(data)
        if event == "new_message":
            self.seqs.append(_seq.decode(payload).seq)

    async def come(self, url: str, timeout: float) -> None:
        """Connect, join with the cursor, and fetch what the join did not bring. Live frames come meanwhile."""
        device = await asyncio.wait_for(connect(url, self.person.token, self.address), timeout)
        self.device = device
        live: list[bytes] = []
        device.on_frame = live.append
        cursor = {"epoch": self.epoch, "seq": self.seqs[-1] if self.seqs else 0} if self.epoch else None
        topic = f"conversation:{self.conversation}"
        page = msgspec.convert(
            await device.join(topic, "1", timeout, {"cursor": cursor} if cursor else {}), _Page
        )
        self.epoch = page.epoch
        self.seqs += [event.seq for event in page.events]
        while page.more:
            after = {"after_seq": self.seqs[-1]}
            page = msgspec.convert(await device.push(topic, "sync", after, timeout), _Page)
            self.seqs += [event.seq for event in page.events]
        newest = self.seqs[-1] if self.seqs else 0
        for data in live:
            # What a `sync` brought may have come live as well, and is known by its number.
            if data[63:74] == b"new_message" and _seq.decode(_frame.decode(data)[4]).seq > newest:
                self.take(data)
        device.on_frame = self.take


class Listeners:
    """The listeners of one generator process."""

    def __init__(self, url: str, listeners: list[Listener]) -> None:
        self._url = url
        self._listeners = listeners
        self._beating: asyncio.Task[None] | None = None

    async def come(self, width: int, at: float, timeout: float) -> list[float]:
        """From the monotonic time `at`; milliseconds from then until each was back and had everything."""
        self._beating = self._beating or asyncio.create_task(self._beat())
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        jobs: list[Callable[[], Any]] = [
            partial(self._come, listener, at, timeout) for listener in self._listeners
        ]
        return await gather_bounded(jobs, width or len(jobs))

    async def drop(self) -> int:
        """Cut every connection without a goodbye; how many were open."""
        dropped = 0
        for listener in self._listeners:
            if listener.device is not None and not listener.device.closed.done():
                listener.device.drop()
                dropped += 1
        return dropped

    async def attempts(self) -> int:
        """Connections and joins tried so far."""
        return sum(listener.attempts for listener in self._listeners)

    async def heard(self) -> dict[str, list[int]]:
        """What each conversation's listener was given."""
        return {listener.conversation: listener.seqs for listener in self._listeners}

    async def _come(self, listener: Listener, at: float, timeout: float) -> float:
        pause = 0.5
        while True:
            listener.attempts += 1
            try:
                await listener.come(self._url, timeout)
                return (time.monotonic() - at) * 1000
            except Exception:  # noqa: BLE001 - refused, reset or late: a client does not care which
                if listener.device is not None:
                    listener.device.drop()
                await asyncio.sleep(random.uniform(0.5, 1) * pause)
                pause = min(10.0, pause * 2)

    async def _beat(self) -> None:
        while True:
            for position, listener in enumerate(self._listeners):
                device = listener.device
                if device is not None and not device.closed.done():
                    with suppress(OSError, AssertionError):
                        device.send(HEARTBEAT)
                if position % 200 == 0:
                    await asyncio.sleep(25 * 200 / max(200, len(self._listeners)))
            await asyncio.sleep(1)


class Senders:
    """The people who stay: `rate` messages a second over all conversations, one conversation after the other."""

    def __init__(self) -> None:
        self._ends: list[tuple[Device, Person, Person, str]] = []
        self.acknowledged: dict[str, int] = {}
        self.refused = 0
        self._stop = asyncio.Event()

    async def join(self, url: str, pairs: list[tuple[Person, Person, str]]) -> None:
        devices: dict[str, Device] = {}
        for sender, other, conversation in pairs:
            device = devices.get(sender.user_id)
            if device is None:
                device = devices[sender.user_id] = await connect(url, sender.token, "127.250.0.1")
                device.on_frame = self._on_frame
            await device.join(f"conversation:{conversation}", ref="1")
            self._ends.append((device, sender, other, conversation))
        self._devices = list(devices.values())

    def _on_frame(self, data: bytes) -> None:
        if data[:4] == b'["1"' and data[4:9] != b",null":
            _, _, topic, _, payload = _frame.decode(data)
            reply = msgspec.json.decode(payload)
            if reply["status"] == "ok":
                self.acknowledged[topic[13:]] = max(
                    self.acknowledged.get(topic[13:], 0), reply["response"]["seq"]
                )
            else:
                self.refused += 1

    async def send(self, rate: float) -> int:
        """Send until `stop`; how many."""
        started, sent, beaten = time.monotonic(), 0, time.monotonic()
        while not self._stop.is_set():
            wanted = int((time.monotonic() - started) * rate)
            for number in range(sent, wanted):
                device, sender, other, conversation = self._ends[number * 7919 % len(self._ends)]
                _, payload = signed_payload(sender, conversation, [other.device_id])
                device.send(
                    b'["1","%d","conversation:%s","new_message",%s]'
                    % (number, conversation.encode(), payload)
                )
            sent = max(sent, wanted)
            if time.monotonic() - beaten > 20:
                beaten = time.monotonic()
                for device in self._devices:
                    device.send(HEARTBEAT)
            await asyncio.sleep(0.005)
        return sent

    def stop(self) -> None:
        self._stop.set()


def _check(heard: dict[str, list[int]], acknowledged: dict[str, int]) -> dict[str, int]:
    """How many conversations are not as promised, by what is wrong."""
    missed = sum(max(seqs, default=0) < acknowledged.get(name, 0) for name, seqs in heard.items())
    twice = sum(len(set(seqs)) != len(seqs) for seqs in heard.values())
    holes = sum(sorted(set(seqs)) != list(range(1, max(seqs, default=0) + 1)) for seqs in heard.values())
    disordered = sum(seqs != sorted(seqs) for seqs in heard.values())
    return {"missed": missed, "twice": twice, "with a hole": holes, "out of order": disordered}


async def _conversations(instance: Instance, connections: int) -> list[tuple[Person, Person, str]]:
    senders = await register_many(instance.url, -(-connections // PER_SENDER))
    people = await register_many(instance.url, connections)
    pairs = [(senders[number // PER_SENDER], person) for number, person in enumerate(people)]
    async with httpx.AsyncClient(timeout=60) as http:
        ids = await gather_bounded(
            [partial(open_conversation, http, instance.url, one, [two]) for one, two in pairs]
        )
    return [(sender, person, found) for (sender, person), found in zip(pairs, ids, strict=True)]


async def _storm(
    instance: Instance, fleet: Fleet, senders: Senders, arguments: argparse.Namespace
) -> dict[str, Any]:
    begun = time.monotonic()
    await fleet.call("come", 256, begun, 30.0)
    first = time.monotonic() - begun
    sending = asyncio.create_task(senders.send(arguments.rate))
    await asyncio.sleep(arguments.settle)
    tried = sum(await fleet.call("attempts"))
    dropped = sum(await fleet.call("drop"))
    await asyncio.sleep(arguments.away)
    before = used(instance)
    at = time.monotonic() + 0.2
    times = sorted(
        late for share in await fleet.call("come", arguments.width, at, arguments.timeout) for late in share
    )
    spent = cpu_between(before, used(instance))
    await asyncio.sleep(arguments.settle)
    senders.stop()
    sent = await sending
    # What was acknowledged last is still on its way to its listener.
    await asyncio.sleep(5)
    return {
        "connections": len(times),
        "dropped": dropped,
        "first joined in s": first,
        "all back in s": times[-1] / 1000,
        "back P50 ms": percentile(times, 0.5),
        "back P99 ms": percentile(times, 0.99),
        "tried each": (sum(await fleet.call("attempts")) - tried) / len(times),
        "CPU ms each": 1000 * sum(spent.values()) / len(times),
        "sent": sent,
        "refused": senders.refused,
    }


async def _measure(arguments: argparse.Namespace) -> int:
    workers = arguments.workers or -(-arguments.connections // PER_WORKER)
    with own_instance(
        WHISPR_MESSAGING_WORKERS=str(workers), WHISPR_AUTH_ACCESS_TOKEN_SECONDS="3600"
    ) as instance:
        pairs = await _conversations(instance, arguments.connections)
        url = instance.socket_url(direct=True)
        listeners = [
            Listener(person, conversation, address_of(number))
            for number, (_, person, conversation) in enumerate(pairs)
        ]
        processes = -(-len(listeners) // PER_PROCESS)
        shares = [(url, listeners[index::processes]) for index in range(processes)]
        senders = Senders()
        await senders.join(url, pairs)
        async with Fleet(Listeners, shares) as fleet:
            row = await _storm(instance, fleet, senders, arguments)
            heard = {name: seqs for share in await fleet.call("heard") for name, seqs in share.items()}
    wrong = _check(heard, senders.acknowledged)
    row |= wrong | {"events": sum(len(seqs) for seqs in heard.values())}
    publish(
        "reconnect-storm",
        f"{len(listeners):,} people with a 1:1 conversation each; dropped, {arguments.away:g} s away, then all back at "
        f"once; {arguments.rate:g} messages/s all the time; {workers} messaging processes, {processes} generator "
        "processes, past the gateway",
        [row],
    )
    return 1 if any(wrong.values()) or not row["events"] else 0


def main(argv: list[str]) -> int:
    """`whispr bench reconnect-storm [--connections N] [--rate R]`; status 1 when an event was missed or came twice."""
    parser = argparse.ArgumentParser(prog="whispr bench reconnect-storm", description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=500, help="messages a second, all the time")
    parser.add_argument("--away", type=float, default=5, help="seconds between the drop and the return")
    parser.add_argument(
        "--settle", type=float, default=5, help="seconds before the drop and after the return"
    )
    parser.add_argument("--timeout", type=float, default=20, help="seconds after which a client tries again")
    parser.add_argument(
        "--width", type=int, default=1_000, help="returns under way at once per process; 0: all"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="messaging processes; 0: as many as are needed"
    )
    return uvloop.run(_measure(parser.parse_args(argv)))
