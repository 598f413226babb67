"""Devices send without pause while processes are killed with -9 at random; afterwards every promise is checked.

Checked for each conversation: every acknowledged message is in the history once, under the `seq` it was acknowledged
with; `seq` has no holes; and every device, whatever it lived through, was given every event exactly once and in order.
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
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import httpx
import msgspec
import uvloop
from nacl.signing import SigningKey

from bench.instance import Instance, own_instance
from bench.load import Person, device_document, gather_bounded, open_conversation, signed_payload
from bench.report import percentile, publish
from whispr.client.failures import ApiError, Unreachable
from whispr.client.feed import Feed, JoinReply, SyncReply
from whispr.client.models import LogEvent
from whispr.client.rest import RestClient
from whispr.client.socket import Channel, Socket

TARGETS = ("messaging", "postgres", "valkey", "auth")
GROUP = 10
SETTLE_SECONDS = 120.0


class Acknowledged(msgspec.Struct):
    """The reply to a `new_message`."""

    id: str
    seq: int


class Carried(msgspec.Struct):
    """What is compared of a message."""

    client_id: str
    sender_device_id: str


@dataclass
class Member:
    """A device in one conversation: what it sent, what was acknowledged, what it was given."""

    person: Person
    rest: RestClient
    conversation: str = ""
    others: list[str] | None = None
    acknowledged: dict[str, Acknowledged] = field(default_factory=dict)
    given: list[tuple[int, str]] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    socket: Socket | None = None
    channel: Channel | None = None
    feed: Feed | None = None

    def connect(self, url: str) -> None:
        """Connect for good, and follow the conversation from its first event."""
        self.socket = Socket(url, self.rest)
        self.feed = Feed(
            None,
            0,
            deliver=self._deliver,
            fetch=self._fetch,
            lost=lambda first, last: self.troubles.append(f"told that {first}-{last} are lost"),
            reset=lambda epoch: self.troubles.append("the log was reset"),
        )
        self.channel = self.socket.channel(
            f"conversation:{self.conversation}",
            params=self.feed.params,
            on_join=lambda raw: self._feed().joined(msgspec.json.decode(raw, type=JoinReply)),
            on_event=self._on_event,
        )
        self.socket.start()

    def _feed(self) -> Feed:
        assert self.feed is not None
        return self.feed

    def _deliver(self, events: list[LogEvent]) -> None:
        for event in events:
            message = msgspec.json.decode(event.payload, type=Carried)
            self.given.append((event.seq, message.client_id))

    async def _fetch(self, after: int) -> SyncReply:
        assert self.channel is not None
        return msgspec.json.decode(await self.channel.push("sync", {"after_seq": after}), type=SyncReply)

    def _on_event(self, event: str, payload: msgspec.Raw) -> None:
        if event == "new_message":
            seq = msgspec.json.decode(payload, type=_Numbered).seq
            self._feed().offer([LogEvent(seq=seq, event=event, payload=payload)])

    async def send_until(self, stop: asyncio.Event, pause: float) -> None:
        """Send one message after another; each is pushed again until it is acknowledged."""
        assert self.channel is not None
        while not stop.is_set():
            client_id, payload = signed_payload(self.person, self.conversation, self.others)
            document = msgspec.json.decode(payload)
            started = time.monotonic()
            while True:
                try:
                    reply = await self.channel.push("new_message", document, timeout=5)
                    self.acknowledged[client_id] = msgspec.json.decode(reply, type=Acknowledged)
                    self.latencies.append(time.monotonic() - started)
                    break
                except Unreachable:
                    pass
                except ApiError as refusal:
                    if refusal.code not in _PASSING:
                        self.troubles.append(f"refused: {refusal.code}")
                        return
                if stop.is_set():
                    return
                await asyncio.sleep(random.uniform(0.05, 0.2))
            await asyncio.sleep(random.uniform(0, 2 * pause))


class _Numbered(msgspec.Struct):
    seq: int


_PASSING = frozenset(
    {
        "unavailable",
        "database_unavailable",
        "neighbour_unavailable",
        "overloaded",
        "sending_unavailable",
        "cache_unavailable",
        "identity_unavailable",
    }
)


async def _register(url: str) -> Member:
    key = SigningKey.generate()
    rest = RestClient(url)
    session = await rest.register(f"c{uuid4().hex[:24]}", "a password of the bench", device_document(key))
    return Member(Person(str(session.user_id), str(session.device_id), session.access_token, key), rest)


async def _settle(instance: Instance, devices: int) -> list[Member]:
    """Half of the devices in pairs with an envelope each, half in groups with a shared ciphertext."""
    members = await gather_bounded([lambda: _register(instance.url)] * devices, 4)
    in_groups = devices // 2 // GROUP * GROUP
    rooms = [members[start : start + GROUP] for start in range(0, in_groups, GROUP)]
    rooms += [members[start : start + 2] for start in range(in_groups, devices - 1, 2)]
    async with httpx.AsyncClient(timeout=60) as http:
        for room in rooms:
            people = [member.person for member in room]
            conversation = await open_conversation(http, instance.url, people[0], people[1:])
            for member in room:
                member.conversation = conversation
                if len(room) == 2:
                    member.others = [other.person.device_id for other in room if other is not member]
    return [member for room in rooms for member in room]


async def _kill_at_random(
    instance: Instance, stop: asyncio.Event, pauses: tuple[float, float], kills: Counter[str]
) -> None:
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), random.uniform(*pauses))
            return
        target = random.choice(TARGETS)
        run = instance.run
        part = run[target] if target in run else run["services"][target]
        with contextlib.suppress(ProcessLookupError):
            os.kill(part["pid"], signal.SIGKILL)
            kills[target] += 1


async def _all_given(room: list[Member], size: int) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while any(len(member.given) < size for member in room) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)


async def _history(member: Member) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    while True:
        page = await member.rest.messages(
            UUID(member.conversation), after_seq=found[-1][0] if found else 0, limit=100
        )
        found += [(message.seq, str(message.client_id)) for message in page.items]
        if not page.items:
            return found


def _check_room(room: list[Member], history: list[tuple[int, str]]) -> list[str]:
    wrong: list[str] = []
    seqs = [seq for seq, _ in history]
    if seqs != list(range(1, len(seqs) + 1)):
        wrong.append("history has holes or repeats a seq")
    by_client_id = {client_id: seq for seq, client_id in history}
    if len(by_client_id) != len(history):
        wrong.append("history holds a message twice")
    for member in room:
        name = member.person.device_id[-6:]
        lost = [
            client_id
            for client_id, answer in member.acknowledged.items()
            if by_client_id.get(client_id) != answer.seq
        ]
        if lost:
            wrong.append(f"{name}: {len(lost)} acknowledged messages are missing or have another seq")
        if member.given != history:
            wrong.append(f"{name}: was given {len(member.given)} of {len(history)} events, or not in order")
        wrong += [f"{name}: {trouble}" for trouble in member.troubles]
    return wrong


async def _measure(arguments: argparse.Namespace) -> int:
    kills: Counter[str] = Counter()
    with own_instance() as instance:
        members = await _settle(instance, arguments.devices)
        url = instance.socket_url(direct=arguments.direct)
        for member in members:
            member.connect(url)
        stop_sending, stop_killing = asyncio.Event(), asyncio.Event()
        senders = [
            asyncio.create_task(member.send_until(stop_sending, arguments.pause)) for member in members
        ]
        killer = asyncio.create_task(
            _kill_at_random(instance, stop_killing, (arguments.least, arguments.most), kills)
        )
        await asyncio.sleep(arguments.minutes * 60)
        stop_killing.set()
        await killer
        # Senders go on until everything runs again, so that what was in flight is acknowledged and not given up.
        await asyncio.sleep(15)
        stop_sending.set()
        await asyncio.wait_for(asyncio.gather(*senders), 60)
        rooms: dict[str, list[Member]] = {}
        for member in members:
            rooms.setdefault(member.conversation, []).append(member)
        wrong: list[str] = []
        stored = 0
        for room in rooms.values():
            history = await _history(room[0])
            stored += len(history)
            await _all_given(room, len(history))
            wrong += _check_room(room, history)
        instance.keep_logs = bool(wrong)
        latencies = sorted(second * 1000 for member in members for second in member.latencies)
        for member in members:
            assert member.socket is not None
            await member.socket.stop()
            await member.rest.close()
    acknowledged = sum(len(member.acknowledged) for member in members)
    publish(
        "chaos",
        f"{len(members)} devices in {len(rooms)} conversations, {arguments.minutes:g} min, a kill -9 every "
        f"{arguments.least:g}-{arguments.most:g} s; {'past' if arguments.direct else 'through'} the gateway",
        [
            {
                "kills": sum(kills.values()),
                **{f"of {target}": kills[target] for target in TARGETS},
                "acknowledged": acknowledged,
                "stored": stored,
                "given to devices": sum(len(member.given) for member in members),
                "ack P50 ms": percentile(latencies, 0.5),
                "ack max s": percentile(latencies, 1) / 1000,
                "wrong": len(wrong),
            }
        ],
        wrong=wrong[:50],
    )
    for line in wrong[:50]:
        print("WRONG", line)
    return 1 if wrong or not acknowledged else 0


def main(argv: list[str]) -> int:
    """`whispr bench chaos [--minutes M] [--devices N]`; exit status 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="whispr bench chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--devices", type=int, default=50)
    parser.add_argument("--pause", type=float, default=0.2, help="mean seconds between a device's messages")
    parser.add_argument("--least", type=float, default=2, help="least seconds between kills")
    parser.add_argument("--most", type=float, default=8, help="most seconds between kills")
    parser.add_argument("--direct", action="store_true", help="sockets past the gateway")
    return uvloop.run(_measure(parser.parse_args(argv)))
