"""Devices that send and listen over real sockets, and what must hold afterwards, whatever happened to the servers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx
import msgspec
from tests.services.messaging.door import signature_of
from tests.stack import PASSWORD, DeviceKeys, Person, b64

from whispr.client.backoff import Backoff
from whispr.client.failures import PASSING_CODES, ApiError, Unreachable
from whispr.client.feed import Feed, JoinReply, SyncReply
from whispr.client.models import LogEvent
from whispr.client.socket import Channel, Socket, SocketOptions

QUICK = SocketOptions(
    heartbeat=2.0,
    reply_timeout=4.0,
    connect_timeout=3.0,
    reconnect=Backoff(base=0.1, cap=0.5),
    rejoin=Backoff(base=0.1, cap=0.5),
)
PASSING = PASSING_CODES | {"sending_unavailable", "neighbour_unavailable", "identity_unavailable"}
EVENTS = frozenset({"new_message", "member_added", "member_removed", "conversation_updated"})


class Acknowledged(msgspec.Struct):
    """The reply to a `new_message`."""

    id: str
    seq: int


class _Numbered(msgspec.Struct):
    seq: int


class _Token:
    def __init__(self, token: str) -> None:
        self._token = token

    async def access_token(self, *, refused: str | None = None) -> str:
        return self._token


@dataclass
class Log:
    """One conversation as one device lived through it."""

    conversation: str
    acknowledged: dict[str, Acknowledged] = field(default_factory=dict)
    given: list[int] = field(default_factory=list)
    arrived: dict[int, float] = field(default_factory=dict)
    """When each event was given, on the monotonic clock."""
    troubles: list[str] = field(default_factory=list)
    channel: Channel | None = None
    feed: Feed | None = None

    @property
    def open_channel(self) -> Channel:
        assert self.channel is not None
        return self.channel


class Device:
    """A person with one device, on the socket at `url`."""

    def __init__(self, person: Person, url: str) -> None:
        self.person = person
        self.socket = Socket(url, _Token(person.token), options=QUICK)
        self.logs: dict[str, Log] = {}
        self.slowest = 0.0
        """Seconds that the slowest message took from its first push to its acknowledgement."""
        self.unanswered = 0
        """Pushes of which nothing was heard: the connection was lost, or it took too long."""

    def follow(self, conversation: str) -> Log:
        """Join the conversation for good, from its first event."""
        log = Log(conversation)

        def deliver(events: list[LogEvent]) -> None:
            for event in events:
                log.given.append(event.seq)
                log.arrived[event.seq] = time.monotonic()

        async def fetch(after: int) -> SyncReply:
            raw = await log.open_channel.push("sync", {"after_seq": after})
            return msgspec.json.decode(raw, type=SyncReply)

        feed = log.feed = Feed(
            None,
            0,
            deliver=deliver,
            fetch=fetch,
            lost=lambda first, last: log.troubles.append(f"told that {first}-{last} are lost"),
            reset=lambda epoch: log.troubles.append("the log was reset"),
        )

        def on_event(event: str, payload: msgspec.Raw) -> None:
            if event in EVENTS:
                seq = msgspec.json.decode(payload, type=_Numbered).seq
                feed.offer([LogEvent(seq=seq, event=event, payload=payload)])

        log.channel = self.socket.channel(
            f"conversation:{conversation}",
            params=feed.params,
            on_join=lambda raw: feed.joined(msgspec.json.decode(raw, type=JoinReply)),
            on_event=on_event,
            on_closed=lambda refusal: log.troubles.append(f"the channel was closed: {refusal}"),
        )
        self.logs[conversation] = log
        return log

    async def send(self, conversation: str, *, patience: float = 30.0) -> Acknowledged | None:
        """Push one message again and again until it is acknowledged; None when it was not within `patience` seconds."""
        log = self.logs[conversation]
        content = {"ciphertext": b64(uuid4().bytes)}
        client_id = str(uuid4())
        document = {
            "client_id": client_id,
            "message_type": "text",
            "content": content,
            "signature": signature_of(self.person, conversation, client_id, content),
        }
        began = time.monotonic()
        while time.monotonic() - began < patience:
            try:
                reply = await log.open_channel.push("new_message", document)
            except Unreachable:
                self.unanswered += 1
            except ApiError as refusal:
                if refusal.code not in PASSING:
                    log.troubles.append(f"refused: {refusal.code}")
                    return None
            else:
                answer = msgspec.json.decode(reply, type=Acknowledged)
                log.acknowledged[client_id] = answer
                self.slowest = max(self.slowest, time.monotonic() - began)
                return answer
            await asyncio.sleep(random.uniform(0.02, 0.1))
        log.troubles.append("a message was never acknowledged")
        return None

    async def send_until(self, stop: asyncio.Event, pause: float, *, but: Sequence[str] = ()) -> None:
        """Send into every conversation in turn, `but` these."""
        while not stop.is_set():
            for conversation in self.logs.keys() - set(but):
                await self.send(conversation)
            await asyncio.sleep(random.uniform(0, 2 * pause))

    async def stop(self) -> None:
        for log in self.logs.values():
            if log.feed is not None:
                log.feed.close()
        await self.socket.stop()


async def register(http: httpx.AsyncClient, url: str) -> Person:
    """A new person with one device, at the REST door `url` of auth."""
    keys, name = DeviceKeys(), f"f{uuid4().hex[:20]}"
    answer = await http.post(
        f"{url}/api/v1/auth/register",
        json={"username": name, "password": PASSWORD, "device": keys.registration()},
    )
    assert answer.status_code == 201, answer.text
    return Person(name, PASSWORD, keys, answer.json())


async def open_group(http: httpx.AsyncClient, url: str, people: Sequence[Person]) -> str:
    """A group of `people`, made by the first, at the REST door `url` of messaging."""
    body = {"type": "group", "member_ids": [str(person.user_id) for person in people[1:]]}
    answer = await http.post(f"{url}/api/v1/conversations", json=body, headers=people[0].headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def history(
    http: httpx.AsyncClient, url: str, person: Person, conversation: str
) -> list[dict[str, Any]]:
    """Every event of the conversation as `person` sees it."""
    events: list[dict[str, Any]] = []
    while True:
        answer = await http.get(
            f"{url}/api/v1/conversations/{conversation}/events",
            params={"after_seq": events[-1]["seq"] if events else 0, "limit": 100},
            headers=person.headers,
        )
        assert answer.status_code == 200, answer.text
        page = answer.json()
        events += page["items"]
        if not page["more"]:
            return events


async def eventually(check: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait until `check` holds; how long that took. Fails after `seconds`."""
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < seconds, what
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def assert_kept(devices: Sequence[Device], conversation: str, events: list[dict[str, Any]]) -> int:
    """Every promise for one conversation whose log is `events`; the number of messages acknowledged."""
    seqs = [event["seq"] for event in events]
    assert seqs == list(range(1, len(seqs) + 1)), "seq is dense"
    stored = [
        (event["payload"]["client_id"], event["seq"]) for event in events if event["event"] == "new_message"
    ]
    assert len({client_id for client_id, _ in stored}) == len(stored), "nothing is stored twice"
    where = dict(stored)
    acknowledged = 0
    for device in devices:
        log = device.logs[conversation]
        assert log.troubles == []
        assert log.given == seqs, "every device was given every event once and in order"
        for client_id, answer in log.acknowledged.items():
            assert where.get(client_id) == answer.seq, "what was acknowledged is stored where it was said"
        acknowledged += len(log.acknowledged)
    return acknowledged
