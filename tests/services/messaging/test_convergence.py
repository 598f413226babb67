"""A device that was away ends where one that was not is, and both where a fresh fetch begins."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.services.messaging.replica import Replica
from tests.services.messaging.rooms import Auth, Device, make_conversation

from whispr.kit.cache import Cache, RateLimiter
from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.kit.errors import Failure, Kind
from whispr.services.messaging.models import (
    Actor,
    CommittedEvent,
    MessageNotFound,
    Role,
    render_event,
    render_message,
    seen_above,
)
from whispr.services.messaging.service.changes import Changes
from whispr.services.messaging.service.contact import Contact
from whispr.services.messaging.service.devices import Devices
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.events import EventBus
from whispr.services.messaging.service.expiry import Expiry
from whispr.services.messaging.service.history import History
from whispr.services.messaging.service.members import Members
from whispr.services.messaging.service.pins import Pins
from whispr.services.messaging.service.privacy import ReadReceipts
from whispr.services.messaging.service.reactions import Reactions
from whispr.services.messaging.service.retention import Retention
from whispr.services.messaging.service.sending import Sending
from whispr.services.messaging.service.signatures import SignatureChecker
from whispr.services.messaging.service.structure import Structure
from whispr.services.messaging.store import members as member_store
from whispr.services.messaging.store.sending import PLANNER

REACTIONS = ("👍", "❤️", "token/with==")


@dataclass
class _Friendly:
    allowed: bool = True
    reason: str = "ok"
    knows_sender: bool = True


class Friends:
    """Everybody may write to everybody, and nobody hides anything."""

    async def check_contactability(
        self, sender_id: UUID, recipient_ids: Collection[UUID], purpose: str
    ) -> Mapping[UUID, _Friendly]:
        return {user_id: _Friendly() for user_id in recipient_ids}

    async def check_pairs(self, pairs: Collection[tuple[UUID, UUID]], purpose: str) -> list[_Friendly]:
        return [_Friendly() for _ in pairs]

    async def blocked(self, user_id: UUID, others: Collection[UUID]) -> frozenset[UUID]:
        return frozenset()

    def meet(self, user_id: UUID, strangers: int) -> None:
        """Nobody turns to too many."""

    async def get_profiles(self, user_ids: Collection[UUID]) -> list[Any]:
        return []


class Node:
    """A node without its doors."""

    def __init__(self, url: str, valkey_url: str, clock: ManualClock, auth: Auth) -> None:
        friends = Friends()
        self.db = Database(url, pool_size=3)
        self.flush_db = Database(url, pool_size=1, settings=PLANNER)
        self.cache = Cache(valkey_url)
        self.history = History(self.db)
        self.bus = EventBus(self.cache, self.history)
        self.directory = Directory(self.db, self.cache, clock)
        self.bus.on_structure(self.directory.invalidate)
        structure = Structure(self.db, clock, self.directory, friends, self.bus, friends, lambda: None)
        self.sending = Sending(
            self.flush_db,
            clock,
            self.directory,
            Devices(auth, clock),
            Contact(friends, clock),
            SignatureChecker(0),
            self.bus.publish,
            self.bus.suspect,
        )
        self.changes = Changes(structure, self.sending)
        self.reactions = Reactions(structure, self.sending)
        self.pins = Pins(structure, self.sending)
        self.members = Members(
            structure,
            ReadReceipts(friends, friends, self.cache, clock),
            RateLimiter(self.cache, enabled=False),
        )
        self.expiry = Expiry(self.db, clock, self.bus.publish, self.bus.suspect, lambda: None)
        self.retention = Retention(
            self.db, clock, self.bus.publish, self.bus.suspect, lambda: None, longest=lambda: None
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Node]:
        await self.db.open()
        await self.flush_db.open()
        self.directory.start()
        self.bus.start()
        loops = [asyncio.create_task(loop()) for loop in (self.cache.run, self.bus.run, self.sending.run)]
        try:
            yield self
        finally:
            await self.sending.drain()
            await self.bus.close()
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            await self.cache.close()
            await self.flush_db.close()
            await self.db.close()


class Pair:
    """Two nodes, and whose devices listen on each to which group."""

    def __init__(self, url: str, valkey_url: str) -> None:
        self.clock = ManualClock()
        self.auth = Auth()
        self.nodes = [Node(url, valkey_url, self.clock, self.auth) for _ in range(2)]
        self.live: list[dict[UUID, tuple[Replica, Device]]] = [{} for _ in self.nodes]
        for node, live in zip(self.nodes, self.live, strict=True):
            node.bus.on_events(partial(self._take, live))

    @staticmethod
    def _take(live: dict[UUID, tuple[Replica, Device]], room: UUID, events: list[CommittedEvent]) -> None:
        replica, device = live[room]
        for event in events:
            assert event.seq == replica.cursor + 1, "each once and in order"
            replica.apply(json.loads(render_event(seen_above(event, 0), device.device_id)))


class House:
    """A group on two nodes: its owner with two devices, two members, and a guest who comes and goes."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self.clock, self.auth, self.nodes = pair.clock, pair.auth, pair.nodes
        owner = self.auth.add()
        self.devices = [owner, self.auth.add(owner.user_id), *(self.auth.add() for _ in range(3))]
        self.owner, self.guest = owner, self.devices[-1]
        self.is_guest_in = True
        self.room = UUID(int=0)
        self.sent: list[tuple[UUID, UUID, UUID]] = []
        self.reacted: list[tuple[Device, UUID, str]] = []
        self.live: list[Replica] = []

    async def open(self) -> None:
        people = dict.fromkeys(device.user_id for device in self.devices)
        self.room = await make_conversation(self.nodes[0].db, self.clock, list(people))
        for node, live in zip(self.nodes, self._pair.live, strict=True):
            replica = await self.fetch(self.owner)
            self.live.append(replica)
            live[self.room] = replica, self.owner
            node.bus.serve(self.room)
            node.bus.settle(self.room, 0)
        for at in range(len(self.devices)):
            await self.do(Act("send", at % 2, at, at, 7))
            await self.do(Act("pin", at % 2, at, at, 7))

    def close(self) -> None:
        for node in self.nodes:
            node.bus.release(self.room)

    async def fetch(self, device: Device) -> Replica:
        """What the person sees who asks now."""
        node = self.nodes[0]
        membership = await node.directory.reader(self.room, device.user_id)
        fresh = Replica(str(device.user_id))
        after = 0
        while True:
            page = await node.history.messages(membership, after_seq=after, limit=7)
            for message in page.items:
                shown = json.loads(render_message(message, device.device_id))
                fresh.messages[shown["id"]] = shown
            fresh.cursor = page.head_seq
            if not page.items:
                break
            after = page.items[-1].head.seq
        pins, following = await node.pins.list_page(membership, None, 100)
        assert following is None
        fresh.pins = {str(pin.message.head.id): (str(pin.pinned_by), _time(pin.pinned_at)) for pin in pins}
        fresh.members = await self.members()
        return fresh

    async def members(self) -> dict[str, tuple[str, str]]:
        async with self.nodes[0].db.connection() as connection:
            rows = await member_store.list_active(connection, [self.room])
        return {str(row.user_id): (row.role.value, _time(row.joined_at)) for row in rows}

    async def recover(self, replica: Replica, device: Device) -> None:
        """Apply what the log has after the replica's cursor."""
        node = self.nodes[1]
        while True:
            membership = await node.directory.reader(self.room, device.user_id)
            page = await node.history.events(membership, after_seq=replica.cursor, limit=4)
            for event in page.items:
                replica.apply(json.loads(render_event(event, device.device_id)))
            if not page.more:
                break
        if replica.misses_members:
            replica.members = await self.members()

    async def caught_up(self) -> None:
        """Both live devices have what is committed."""
        async with asyncio.timeout(5):
            head = (await self.nodes[0].history.heads([self.room])).get(self.room, 0)
            while any(replica.cursor < head for replica in self.live):
                await asyncio.sleep(0.002)

    # What happens.

    async def do(self, act: Act) -> None:
        """Try it; being refused is part of life, failing is not."""
        try:
            await getattr(self, f"_{act.what}")(
                self.nodes[act.node], self.devices[act.who % len(self.devices)], act.which, act.how
            )
        except Failure as failure:
            if failure.kind in (Kind.INTERNAL, Kind.UNAVAILABLE):
                raise

    def _message(self, which: int) -> tuple[UUID, UUID, UUID]:
        if not self.sent:
            raise MessageNotFound
        return self.sent[which % len(self.sent)]

    def _content(self, device: Device, how: int) -> dict[str, Any]:
        body = base64.b64encode(uuid4().bytes).decode()
        if how % 2:
            return {"ciphertext": body}
        gone = None if self.is_guest_in else self.guest
        others = [other for other in self.devices if other is not device and other is not gone]
        return {"envelopes": {str(other.device_id): {"type": "message", "body": body} for other in others}}

    async def _send(self, node: Node, device: Device, which: int, how: int) -> None:
        draft = device.draft(self.room, self._content(device, which), expires_in=how + 1 if how < 4 else None)
        result = await node.sending.send(draft)
        self.sent.append((result.message.head.id, draft.client_id, device.user_id))

    async def _edit(self, node: Node, device: Device, which: int, how: int) -> None:
        message_id, client_id, author_id = self._message(which)
        own = [other for other in self.devices if other.user_id == author_id]
        device = own[how % len(own)]
        content = self._content(device, how)
        signature = device.sign(self.room, client_id, content)
        encoded = json.dumps(content).encode()
        await node.changes.edit(_actor(device), self.room, message_id, encoded, signature)

    async def _delete(self, node: Node, device: Device, which: int, how: int) -> None:
        await node.changes.delete(_actor(device), self.room, self._message(which)[0])

    async def _react(self, node: Node, device: Device, which: int, how: int) -> None:
        reaction = REACTIONS[how % len(REACTIONS)]
        message_id = self._message(which)[0]
        await node.reactions.add(_actor(device), self.room, message_id, reaction)
        self.reacted.append((device, message_id, reaction))

    async def _unreact(self, node: Node, device: Device, which: int, how: int) -> None:
        if self.reacted:
            device, message_id, reaction = self.reacted[which % len(self.reacted)]
            await node.reactions.remove(_actor(device), self.room, message_id, reaction)

    async def _pin(self, node: Node, device: Device, which: int, how: int) -> None:
        await node.pins.pin(_actor(self.owner), self.room, self._message(which)[0])

    async def _unpin(self, node: Node, device: Device, which: int, how: int) -> None:
        await node.pins.unpin(_actor(self.owner), self.room, self._message(which)[0])

    async def _wait(self, node: Node, device: Device, which: int, how: int) -> None:
        self.clock.advance(how + 1)
        await node.expiry.erase_due()

    async def _purge(self, node: Node, device: Device, which: int, how: int) -> None:
        async with node.db.connection() as connection:
            await connection.execute(
                "UPDATE conversations SET retention_seconds = $2 WHERE id = $1", self.room, how + 1
            )
        await node.retention.purge_outdated()
        async with node.db.connection() as connection:
            await connection.execute(
                "UPDATE conversations SET retention_seconds = NULL WHERE id = $1", self.room
            )

    async def _turn(self, node: Node, device: Device, which: int, how: int) -> None:
        """The guest leaves, or comes back."""
        if self.is_guest_in:
            await node.members.remove(self.room, self.owner.user_id, self.guest.user_id)
        else:
            await node.members.add(self.room, self.owner.user_id, [self.guest.user_id], Role.MEMBER)
        self.is_guest_in = not self.is_guest_in

    async def _promote(self, node: Node, device: Device, which: int, how: int) -> None:
        role = Role.ADMIN if how % 2 else Role.MEMBER
        await node.members.change_role(self.room, self.owner.user_id, self.devices[2].user_id, role)


@dataclass(frozen=True)
class Act:
    what: str
    node: int
    who: int
    which: int
    how: int


def _actor(device: Device) -> Actor:
    return Actor(device.user_id, device.device_id)


def _time(value: Any) -> str:
    text: str = value.isoformat()
    return text.replace("+00:00", "Z")


OFTEN = ("send", "edit", "edit", "delete", "react", "react", "unreact", "pin", "unpin")
SELDOM = ("wait", "purge", "turn", "turn", "promote")
acts = st.builds(
    Act,
    what=st.sampled_from(OFTEN * 2 + SELDOM),
    node=st.integers(0, 1),
    who=st.integers(0, 4),
    which=st.integers(0, 8),
    how=st.integers(0, 7),
)
rounds = st.lists(
    st.tuples(st.lists(acts, min_size=2, max_size=5), st.booleans(), st.integers(0, 6)),
    min_size=5,
    max_size=15,
)


@pytest.fixture(scope="module")
async def pair(aging_url: str, valkey_url: str) -> AsyncIterator[Pair]:
    # A running service would erase what is over by its own clock, in the middle of a comparison.
    async with AsyncExitStack() as stack:
        both = Pair(aging_url, valkey_url)
        for node in both.nodes:
            await stack.enter_async_context(node.running())
        async with asyncio.timeout(5):
            while any("messaging:nodes" not in node.cache.subscribed for node in both.nodes):
                await asyncio.sleep(0.005)
        yield both


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(life=rounds)
async def test_applying_events_to_any_old_state_ends_in_a_fresh_fetch(
    pair: Pair, life: list[tuple[list[Act], bool, int]]
) -> None:
    place = House(pair)
    await place.open()
    try:
        await live_through(place, life)
    finally:
        place.close()


async def live_through(place: House, life: list[tuple[list[Act], bool, int]]) -> None:
    old = [await place.fetch(place.owner)]
    guest = await place.fetch(place.guest)
    for together, is_kept, back in life:
        await asyncio.gather(*(place.do(act) for act in together))
        if not is_kept:
            continue
        await place.caught_up()
        for copy in (await place.fetch(place.owner), place.live[0].copy()):
            # A device whose cursor lags behind its state applies again what it has applied.
            copy.cursor = max(0, copy.cursor - back)
            old.append(copy)
        if place.is_guest_in:
            await place.recover(guest, place.guest)
            assert guest.state() == (await place.fetch(place.guest)).state()
    await place.caught_up()
    fresh = await place.fetch(place.owner)
    for replica in place.live:
        assert replica.state() == fresh.state(), "live"
    for replica in old:
        await place.recover(replica, place.owner)
        assert replica.state() == fresh.state(), "recovered"
