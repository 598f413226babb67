"""A device that does everything people do in a conversation, keeps at it until it is acknowledged, and remembers it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import msgspec
from nacl.signing import SigningKey

from bench.convergence import LOGGED, Copy
from bench.load import Person, device_document, signed_payload
from whispr.client.failures import ApiError, Unreachable
from whispr.client.feed import Feed, JoinReply, SyncReply
from whispr.client.models import LogEvent
from whispr.client.rest import RestClient
from whispr.client.socket import Channel, Socket

REACTIONS = ("👍", "❤", "😀", "?")
RECENT = 30
"""How far back messages are reacted to, edited, deleted and pinned."""

PASSING = frozenset(
    {
        "unavailable",
        "database_unavailable",
        "neighbour_unavailable",
        "overloaded",
        "sending_unavailable",
        "cache_unavailable",
        "identity_unavailable",
        "timeout",
        "draining",
    }
)
OVERTAKEN = frozenset(
    {"message_deleted", "message_not_found", "too_many_reactions", "too_many_pins", "invalid_send_at"}
)
"""Somebody else was faster, or the time to send at passed while nobody could be asked; nothing was promised."""


class Acknowledged(msgspec.Struct):
    """The reply to `new_message`."""

    id: str
    seq: int


class _Numbered(msgspec.Struct):
    seq: int


class _Identified(msgspec.Struct):
    id: str


@dataclass
class Wishes:
    """What was acknowledged last about each thing, and so must be true in the end.

    `signatures`: of a message's present content; a deleted message has "". `reactions` by (message, reaction), `pins` by
    message. What was asked and never acknowledged is `uncertain`, by message.
    """

    sent: dict[str, Acknowledged] = field(default_factory=dict)
    scheduled: set[str] = field(default_factory=set)
    signatures: dict[str, str] = field(default_factory=dict)
    reactions: dict[tuple[str, str], bool] = field(default_factory=dict)
    pins: dict[str, bool] = field(default_factory=dict)
    guest: bool = False
    uncertain: set[str] = field(default_factory=set)


class Member:
    """One person's device in one conversation. `given` is every event it got, as (seq, name)."""

    def __init__(self, person: Person, rest: RestClient) -> None:
        self.person = person
        self.rest = rest
        self.conversation = ""
        self.others: list[str] | None = None
        self.guest: Person | None = None
        """Whom this device adds and removes in turn; only where it leads a group."""
        self.leads = False
        self.given: list[tuple[int, str]] = []
        self.copy = Copy()
        self.wishes = Wishes()
        self.troubles: list[str] = []
        self.latencies: list[float] = []
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.socket: Socket | None = None
        self._channel: Channel | None = None
        self._feed: Feed | None = None
        self._own: deque[tuple[str, UUID]] = deque(maxlen=RECENT)
        self._seen: deque[str] = deque(maxlen=RECENT)

    @classmethod
    async def register(cls, url: str) -> Member:
        """A new person with one device."""
        key = SigningKey.generate()
        rest = RestClient(url)
        session = await rest.register(f"c{uuid4().hex[:24]}", "a password of the bench", device_document(key))
        person = Person(str(session.user_id), str(session.device_id), session.access_token, key)
        return cls(person, rest)

    # Following the conversation.

    def connect(self, url: str) -> None:
        """Connect for good, and follow the conversation from its first event or from where it was left."""
        self.socket = Socket(url, self.rest)
        feed = self._feed
        if feed is None:
            feed = self._feed = Feed(
                None,
                0,
                deliver=self._deliver,
                fetch=self._fetch,
                lost=lambda first, last: self.troubles.append(f"told that {first}-{last} are lost"),
                reset=lambda epoch: self.troubles.append("the log was reset"),
            )
        self._channel = self.socket.channel(
            f"conversation:{self.conversation}",
            params=feed.params,
            on_join=lambda raw: feed.joined(msgspec.json.decode(raw, type=JoinReply)),
            on_event=self._on_event,
        )
        self.socket.start()

    async def close(self) -> None:
        """Leave for good."""
        if self.socket is not None:
            await self.socket.stop()
        await self.rest.close()

    def _deliver(self, events: list[LogEvent]) -> None:
        for event in events:
            self.given.append((event.seq, event.event))
            self.copy.apply(event)
            if event.event == "new_message":
                self._seen.append(msgspec.json.decode(event.payload, type=_Identified).id)

    async def _fetch(self, after: int) -> SyncReply:
        assert self._channel is not None
        return msgspec.json.decode(await self._channel.push("sync", {"after_seq": after}), type=SyncReply)

    def _on_event(self, event: str, payload: msgspec.Raw) -> None:
        if event in LOGGED and self._feed is not None:
            seq = msgspec.json.decode(payload, type=_Numbered).seq
            self._feed.offer([LogEvent(seq=seq, event=event, payload=payload)])

    # Doing things.

    async def act_until(self, stop: asyncio.Event, pause: float, actions: dict[str, float]) -> None:
        """One thing after the other, chosen by the weights of `actions`, until `stop`."""
        names, weights = list(actions), list(actions.values())
        while not stop.is_set():
            name = random.choices(names, weights)[0]
            try:
                if await _ACTIONS[name](self, stop):
                    self.done[name] += 1
            except ApiError as refusal:
                self.refused[f"{name}: {refusal.code}"] += 1
                if refusal.code not in OVERTAKEN:
                    self.troubles.append(f"{name} refused: {refusal.code}")
            await asyncio.sleep(random.uniform(0, 2 * pause))

    async def _keep_at(self, stop: asyncio.Event, about: str, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Until it is answered; None when `stop` came first. Raises ApiError for a refusal that will stay."""
        started = time.monotonic()
        while True:
            try:
                answer = await attempt()
                self.latencies.append(time.monotonic() - started)
                return answer
            except Unreachable:
                pass
            except ApiError as refusal:
                if refusal.code == "internal":
                    # It may be repeated, and is a defect all the same.
                    self.troubles.append(f"internal error: {refusal.detail} {dict(refusal.fields)}")
                elif not refusal.passing and refusal.code not in PASSING:
                    raise
            self.wishes.uncertain.add(about)
            if stop.is_set():
                return None
            await asyncio.sleep(random.uniform(0.05, 0.2))

    async def _push(self, stop: asyncio.Event, about: str, event: str, document: dict[str, Any]) -> Any:
        assert self._channel is not None
        channel = self._channel
        answer = await self._keep_at(stop, about, lambda: channel.push(event, document, timeout=5))
        if answer is not None:
            self.wishes.uncertain.discard(about)
        return answer

    async def _send(self, stop: asyncio.Event) -> bool:
        client_id, payload = signed_payload(self.person, self.conversation, self.others)
        document = msgspec.json.decode(payload)
        answer = await self._push(stop, client_id, "new_message", document)
        if answer is None:
            return False
        ack = msgspec.json.decode(answer, type=Acknowledged)
        self.wishes.sent[client_id] = ack
        self.wishes.signatures[ack.id] = document["signature"]
        self._own.append((ack.id, UUID(client_id)))
        return True

    async def _edit(self, stop: asyncio.Event) -> bool:
        if not self._own:
            return False
        message_id, client_id = random.choice(self._own)
        _, payload = signed_payload(self.person, self.conversation, self.others, client_id=client_id)
        document = msgspec.json.decode(payload)
        change = {
            "message_id": message_id,
            "content": document["content"],
            "signature": document["signature"],
        }
        if await self._push(stop, message_id, "edit_message", change) is None:
            return False
        self.wishes.signatures[message_id] = document["signature"]
        return True

    async def _delete(self, stop: asyncio.Event) -> bool:
        if not self._own:
            return False
        chosen = random.choice(self._own)
        self._own.remove(chosen)
        if await self._push(stop, chosen[0], "delete_message", {"message_id": chosen[0]}) is None:
            return False
        self.wishes.signatures[chosen[0]] = ""
        return True

    async def _react(self, stop: asyncio.Event) -> bool:
        if not self._seen:
            return False
        message_id, reaction = random.choice(self._seen), random.choice(REACTIONS)
        wanted = random.random() < 0.7
        event = "add_reaction" if wanted else "remove_reaction"
        about = f"{message_id} {reaction}"
        if await self._push(stop, about, event, {"message_id": message_id, "reaction": reaction}) is None:
            return False
        self.wishes.reactions[message_id, reaction] = wanted
        return True

    async def _pin(self, stop: asyncio.Event) -> bool:
        if not self.leads or not self._seen:
            return False
        message_id = random.choice(self._seen)
        wanted = not self.wishes.pins.get(message_id, False)
        event = "pin_message" if wanted else "unpin_message"
        if await self._push(stop, f"{message_id} pin", event, {"message_id": message_id}) is None:
            return False
        self.wishes.pins[message_id] = wanted
        return True

    async def _schedule(self, stop: asyncio.Event) -> bool:
        client_id, payload = signed_payload(self.person, self.conversation, self.others)
        document = msgspec.json.decode(payload)
        document["conversation_id"] = self.conversation
        due = datetime.now(UTC) + timedelta(seconds=random.uniform(10, 20))
        document["send_at"] = due.isoformat()
        if await self._keep_at(stop, client_id, lambda: self.rest.schedule_message(document)) is None:
            return False
        self.wishes.uncertain.discard(client_id)
        self.wishes.scheduled.add(client_id)
        return True

    async def _change_membership(self, stop: asyncio.Event) -> bool:
        if self.guest is None:
            return False
        guest, conversation = UUID(self.guest.user_id), UUID(self.conversation)
        wanted = not self.wishes.guest

        async def attempt() -> bool:
            if wanted:
                await self.rest.add_members(conversation, [guest])
            else:
                try:
                    await self.rest.remove_member(conversation, guest)
                except ApiError as refusal:
                    # The answer to an earlier try may have been lost.
                    if refusal.code != "member_not_found":
                        raise
            return True

        if await self._keep_at(stop, "guest", attempt) is None:
            return False
        self.wishes.uncertain.discard("guest")
        self.wishes.guest = wanted
        return True


_ACTIONS: dict[str, Callable[[Member, asyncio.Event], Awaitable[bool]]] = {
    "send": Member._send,  # noqa: SLF001 - the table of this class
    "edit": Member._edit,  # noqa: SLF001
    "delete": Member._delete,  # noqa: SLF001
    "react": Member._react,  # noqa: SLF001
    "pin": Member._pin,  # noqa: SLF001
    "schedule": Member._schedule,  # noqa: SLF001
    "membership": Member._change_membership,  # noqa: SLF001
}

EVERYTHING = {
    "send": 6.0,
    "edit": 1.0,
    "delete": 0.5,
    "react": 1.5,
    "pin": 0.5,
    "schedule": 0.3,
    "membership": 1.0,
}
"""What people do, by weight."""
