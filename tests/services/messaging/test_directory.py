"""The cache of hot conversations: what it may remember, and when it must forget."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import msgspec
import pytest

from whispr.kit.cache import Cache
from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.kit.ids import uuid7
from whispr.services.messaging.models import (
    ConversationNotFound,
    ConversationType,
    NotAMember,
    Role,
)
from whispr.services.messaging.service.directory import HINTS, Directory
from whispr.services.messaging.store import conversations, members


async def room(db: Database, *user_ids: UUID) -> UUID:
    conversation_id = uuid7()
    now = ManualClock().now()
    async with db.transaction() as tx:
        await conversations.insert(tx, conversation_id, ConversationType.GROUP, user_ids[0], {}, now)
        await members.insert_founders(tx, conversation_id, [(user, Role.MEMBER) for user in user_ids], now)
    return conversation_id


async def take_out(db: Database, conversation_id: UUID, user_id: UUID) -> None:
    async with db.transaction() as tx:
        await members.leave(tx, conversation_id, user_id, 1, ManualClock().now())


class Counting(Directory):
    """Counts its queries."""

    loads = 0

    async def _load(self, conversation_id: UUID):  # type: ignore[no-untyped-def]
        self.loads += 1
        return await super()._load(conversation_id)


async def test_a_member_is_one_and_a_stranger_is_not(messaging_db: Database, messaging_cache: Cache) -> None:
    ann, eve = uuid4(), uuid4()
    conversation = await room(messaging_db, ann)
    directory = Directory(messaging_db, messaging_cache, ManualClock())
    membership = await directory.membership(conversation, ann)
    assert (membership.user_id, membership.role, membership.floor_seq) == (ann, Role.MEMBER, 0)
    with pytest.raises(NotAMember):
        await directory.membership(conversation, eve)
    with pytest.raises(NotAMember):
        await directory.membership(uuid4(), ann)
    with pytest.raises(ConversationNotFound):
        await directory.get(uuid4())
    with pytest.raises(ConversationNotFound):
        await directory.reader(conversation, eve)
    assert (await directory.reader(conversation, ann)) == membership


async def test_callers_share_one_query(messaging_db: Database, messaging_cache: Cache) -> None:
    conversation = await room(messaging_db, uuid4())
    directory = Counting(messaging_db, messaging_cache, ManualClock())
    found = await asyncio.gather(*(directory.get(conversation) for _ in range(10)))
    assert directory.loads == 1
    assert all(item is found[0] for item in found)
    assert directory.peek(conversation) is found[0]


async def test_a_caller_who_gives_up_does_not_cancel_the_others(
    messaging_db: Database, messaging_cache: Cache
) -> None:
    conversation = await room(messaging_db, uuid4())
    directory = Counting(messaging_db, messaging_cache, ManualClock())
    first, second = (asyncio.create_task(directory.get(conversation)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).id == conversation
    assert directory.loads == 1


async def test_an_entry_expires(messaging_db: Database, messaging_cache: Cache) -> None:
    ann, bob = uuid4(), uuid4()
    conversation = await room(messaging_db, ann, bob)
    clock = ManualClock()
    directory = Directory(messaging_db, messaging_cache, clock, ttl=60)
    await directory.get(conversation)
    await take_out(messaging_db, conversation, bob)
    clock.advance(59)
    assert bob in (await directory.get(conversation)).members
    clock.advance(1)
    assert directory.peek(conversation) is None
    assert bob not in (await directory.get(conversation)).members


async def test_fresh_does_not_trust_the_cache(messaging_db: Database, messaging_cache: Cache) -> None:
    ann, bob = uuid4(), uuid4()
    conversation = await room(messaging_db, ann, bob)
    directory = Directory(messaging_db, messaging_cache, ManualClock())
    await directory.membership(conversation, bob)
    await take_out(messaging_db, conversation, bob)
    with pytest.raises(NotAMember):
        await directory.membership(conversation, bob, fresh=True)


async def test_a_load_that_a_change_overtook_is_not_remembered(
    messaging_db: Database, messaging_cache: Cache
) -> None:
    conversation = await room(messaging_db, uuid4())
    directory = Directory(messaging_db, messaging_cache, ManualClock())
    loading = asyncio.create_task(directory.get(conversation))
    await asyncio.sleep(0)
    directory.invalidate(conversation)
    await loading
    assert directory.peek(conversation) is None


async def test_the_cache_is_bounded_by_conversations_and_members(
    messaging_db: Database, messaging_cache: Cache
) -> None:
    rooms = [await room(messaging_db, uuid4(), uuid4()) for _ in range(4)]
    by_count = Directory(messaging_db, messaging_cache, ManualClock(), max_conversations=3)
    by_members = Directory(messaging_db, messaging_cache, ManualClock(), max_members=5)
    for directory, kept in ((by_count, 3), (by_members, 2)):
        for conversation in rooms:
            await directory.get(conversation)
        assert [directory.peek(conversation) is not None for conversation in rooms] == [False] * (
            4 - kept
        ) + [True] * kept
    by_members.clear()
    for conversation in rooms[:2]:
        await by_members.get(conversation)
    assert all(by_members.peek(conversation) for conversation in rooms[:2])


async def test_another_node_forgets_after_a_change(
    messaging_db: Database, messaging_cache: Cache, valkey_url: str
) -> None:
    conversation = await room(messaging_db, uuid4())
    here = Directory(messaging_db, messaging_cache, ManualClock())
    there_cache = Cache(valkey_url)
    there = Directory(messaging_db, there_cache, ManualClock())
    there.start()
    listening = asyncio.create_task(there_cache.run())
    while HINTS not in there_cache.subscribed:
        await asyncio.sleep(0.01)
    await there.get(conversation)
    for noise in (b"not json", b"[]", b'{"kind":"members"}', b'{"kind":"members","conversation_id":"x"}'):
        await messaging_cache.publish(HINTS, noise)
    await messaging_cache.publish(
        HINTS, msgspec.json.encode({"kind": "profile", "user_id": uuid4(), "conversation_id": conversation})
    )
    await messaging_cache.publish(HINTS, msgspec.json.encode({"kind": "members", "conversation_id": uuid4()}))
    await asyncio.sleep(0.05)
    assert there.peek(conversation) is not None
    await here.changed(conversation)
    async with asyncio.timeout(5):
        while there.peek(conversation) is not None:
            await asyncio.sleep(0.01)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await there_cache.close()


async def test_a_change_is_no_failure_while_valkey_is_away(messaging_db: Database) -> None:
    cache = Cache("redis://127.0.0.1:1/0", timeout=0.2)
    conversation = await room(messaging_db, uuid4())
    directory = Directory(messaging_db, cache, ManualClock())
    await directory.get(conversation)
    await directory.changed(conversation)
    assert directory.peek(conversation) is None
    await cache.close()
