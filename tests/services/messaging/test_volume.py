"""Who sends abnormally much is found out, restricted for a while, and let go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.services.messaging.door import Door, assert_problem
from tests.services.messaging.rooms import Device
from tests.services.messaging.test_members import people
from tests.services.messaging.test_sending import Bench
from tests.stack import Stack

from whispr.kit.cache import Cache
from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.services.auth.app import grant_role
from whispr.services.messaging.models import ConversationType, SendResult
from whispr.services.messaging.models.abuse import Restricted, RestrictionNotFound
from whispr.services.messaging.service.restrictions import INCIDENT, Restrictions
from whispr.services.messaging.service.volume import STRANGERS_A_UNIT, Approaches, Volume
from whispr.services.messaging.settings import MessagingSettings

HOUR = timedelta(hours=1)


class Notices:
    """What people are told."""

    def __init__(self) -> None:
        self.told: list[tuple[UUID, str]] = []

    def publish(self, events: Sequence[Any]) -> None:
        raise AssertionError("no events here")

    def notice(self, user_ids: Sequence[UUID], event: str, payload: dict[str, Any]) -> None:
        self.told += [(user_id, event) for user_id in user_ids]


class Node:
    """A node's judgement of volume."""

    def __init__(self, db: Database, cache: Cache, clock: ManualClock, **thresholds: int) -> None:
        self.notices = Notices()
        self.restrictions = Restrictions(db, cache, clock, self.notices)
        limits = {
            "messages_per_minute": 40,
            "messages_per_hour": 100,
            "approaches_per_minute": 5,
            "approaches_per_hour": 8,
            **thresholds,
        }
        self.volume = Volume(cache, clock, self.restrictions, restriction=HOUR, **limits)
        self.approaches = Approaches(self.restrictions, self.volume)

    def send(self, user_id: UUID, count: int) -> None:
        for _ in range(count):
            self.volume.count_message(user_id)

    def is_restricted(self, user_id: UUID) -> bool:
        return self.restrictions.refusal(user_id) is not None


@pytest.fixture
def clock() -> ManualClock:
    clock = ManualClock()
    # The beginning of an hour, so that no window ends while a test counts.
    clock.advance(3_600 - clock.time() % 3_600)
    return clock


@pytest.fixture
async def messaging_db(aging_url: str) -> AsyncIterator[Database]:
    """A database that no service runs on: one whose clock is ahead would end the restrictions of these tests."""
    db = Database(aging_url, pool_size=5)
    await db.open()
    yield db
    await db.close()


@pytest.fixture
async def stack_db(database: Callable[[str], str]) -> AsyncIterator[Database]:
    """The database of the running messaging."""
    db = Database(database("messaging"), pool_size=2)
    await db.open()
    yield db
    await db.close()


@pytest.fixture
def node(messaging_db: Database, messaging_cache: Cache, clock: ManualClock) -> Node:
    return Node(messaging_db, messaging_cache, clock)


async def incidents(db: Database, user_id: UUID) -> list[dict[str, Any]]:
    async with db.connection() as connection:
        rows = await connection.fetch(
            "SELECT payload FROM outbox WHERE topic = $1 AND payload ->> 'user_id' = $2",
            INCIDENT,
            str(user_id),
        )
    return [row["payload"] for row in rows]


async def test_whoever_stays_below_is_left_alone(node: Node, messaging_db: Database) -> None:
    user = uuid4()
    node.send(user, 40)
    await node.volume.fold()
    assert not node.is_restricted(user)
    assert await incidents(messaging_db, user) == []


async def test_too_many_messages_a_minute(node: Node, messaging_db: Database, clock: ManualClock) -> None:
    user, other = uuid4(), uuid4()
    node.send(user, 41)
    node.send(other, 3)
    await node.volume.fold()
    refusal = node.restrictions.refusal(user)
    assert refusal is not None
    assert refusal.retry_after == 3_600
    assert refusal.fields["until"] == (clock.now() + HOUR).isoformat().replace("+00:00", "Z")
    assert not node.is_restricted(other)
    (incident,) = await incidents(messaging_db, user)
    assert (incident["kind"], incident["reason"], incident["count"], incident["limit"]) == (
        "abnormal_volume",
        "messages_per_minute",
        41,
        40,
    )
    assert node.notices.told == [(user, "restricted")]
    # Going on changes nothing: one restriction, one incident, the same end.
    clock.advance(60)
    node.send(user, 41)
    await node.volume.fold()
    assert node.restrictions.refusal(user).fields == refusal.fields  # type: ignore[union-attr]
    assert len(await incidents(messaging_db, user)) == 1


async def test_too_many_messages_an_hour(node: Node, messaging_db: Database, clock: ManualClock) -> None:
    user = uuid4()
    for _ in range(5):
        node.send(user, 20)
        await node.volume.fold()
        clock.advance(61)
    assert not node.is_restricted(user)
    node.send(user, 2)
    await node.volume.fold()
    assert node.is_restricted(user)
    (incident,) = await incidents(messaging_db, user)
    assert incident["reason"] == "messages_per_hour"


async def test_another_hour_counts_anew(node: Node, clock: ManualClock) -> None:
    user = uuid4()
    for _ in range(6):
        node.send(user, 20)
        await node.volume.fold()
        clock.advance(1_200)
    assert not node.is_restricted(user)


async def test_counts_of_all_nodes_add_up(
    messaging_db: Database, messaging_cache: Cache, clock: ManualClock
) -> None:
    nodes = [Node(messaging_db, messaging_cache, clock) for _ in range(3)]
    user = uuid4()
    for node in nodes:
        node.send(user, 14)
    for node in nodes[:2]:
        await node.volume.fold()
    assert not any(node.is_restricted(user) for node in nodes)
    await nodes[2].volume.fold()
    assert nodes[2].is_restricted(user)
    assert len(await incidents(messaging_db, user)) == 1


async def test_the_other_nodes_learn_of_a_restriction_and_of_its_end(
    messaging_db: Database, messaging_cache: Cache, clock: ManualClock
) -> None:
    here, there = [Node(messaging_db, messaging_cache, clock) for _ in range(2)]
    there.restrictions.start()
    running = asyncio.create_task(there.restrictions.run())
    user = uuid4()
    try:
        async with asyncio.timeout(5):
            while "messaging:restrictions" not in messaging_cache.subscribed:
                await asyncio.sleep(0.01)
            await here.restrictions.impose(user, "messages_per_minute", HOUR, {})
            while not there.is_restricted(user):
                await asyncio.sleep(0.01)
            await here.volume.lift(user)
            while there.is_restricted(user):
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_node_that_starts_knows_who_is_restricted(
    node: Node, messaging_db: Database, messaging_cache: Cache, clock: ManualClock
) -> None:
    user = uuid4()
    await node.restrictions.impose(user, "messages_per_minute", HOUR, {})
    late = Node(messaging_db, messaging_cache, clock)
    assert not late.is_restricted(user)
    await late.restrictions.reload()
    assert late.is_restricted(user)
    clock.advance(3_601)
    assert not late.is_restricted(user)
    await late.restrictions.reload()
    async with messaging_db.connection() as connection:
        assert not await connection.fetchval(
            "SELECT count(*) FROM sender_restrictions WHERE user_id = $1", user
        )


async def test_after_its_end_a_restriction_can_come_again(
    node: Node, messaging_db: Database, clock: ManualClock
) -> None:
    user = uuid4()
    for _ in range(2):
        node.send(user, 41)
        await node.volume.fold()
        assert node.is_restricted(user)
        clock.advance(3_601)
        assert not node.is_restricted(user)
    assert len(await incidents(messaging_db, user)) == 2


async def test_whoever_is_let_go_counts_anew(node: Node, messaging_db: Database) -> None:
    user = uuid4()
    node.send(user, 41)
    await node.volume.fold()
    await node.volume.lift(user)
    assert not node.is_restricted(user)
    node.send(user, 40)
    await node.volume.fold()
    assert not node.is_restricted(user)
    with pytest.raises(RestrictionNotFound):
        await node.volume.lift(user)


async def test_without_valkey_a_node_goes_by_what_it_saw(messaging_db: Database, clock: ManualClock) -> None:
    cache = Cache("redis://127.0.0.1:9", timeout=0.2)
    node = Node(messaging_db, cache, clock)
    user = uuid4()
    for _ in range(2):
        node.send(user, 21)
        assert not node.is_restricted(user)
        await node.volume.fold()
    assert node.is_restricted(user)
    await cache.close()


async def test_turning_to_many_strangers(node: Node) -> None:
    user = uuid4()
    for _ in range(5):
        node.approaches.meet(user, 1)
    await node.volume.fold()
    assert not node.is_restricted(user)
    node.approaches.meet(user, 1)
    await node.volume.fold()
    assert node.is_restricted(user)
    with pytest.raises(Restricted):
        node.approaches.meet(user, 1)
    # One large group is several approaches, but nothing abnormal by itself.
    host = uuid4()
    node.approaches.meet(host, 4 * STRANGERS_A_UNIT)
    await node.volume.fold()
    assert not node.is_restricted(host)
    node.approaches.meet(host, 4 * STRANGERS_A_UNIT)
    await node.volume.fold()
    assert node.is_restricted(host)


async def test_a_threshold_of_zero_looks_away(
    messaging_db: Database, messaging_cache: Cache, clock: ManualClock
) -> None:
    node = Node(
        messaging_db,
        messaging_cache,
        clock,
        messages_per_minute=0,
        messages_per_hour=0,
        approaches_per_minute=0,
        approaches_per_hour=0,
    )
    user = uuid4()
    node.send(user, 1_000)
    node.approaches.meet(user, 1_000)
    await node.volume.fold()
    assert not node.is_restricted(user)


async def test_one_largest_group_is_not_abnormal_by_default() -> None:
    limits = MessagingSettings(database_url="postgresql://nowhere/none")
    assert limits.abnormal_approaches_per_minute > 1 + 1_000 // STRANGERS_A_UNIT
    # What the rates let one device do for a minute is not abnormal either.
    assert limits.message_rate * 60 + limits.message_burst < limits.abnormal_messages_per_minute


class House:
    """Sending, with people who are restricted."""

    def __init__(self, bench: Bench, restrictions: Restrictions) -> None:
        self.bench = bench
        self.restrictions = restrictions

    async def restricted_pair(self) -> tuple[UUID, Device, Device]:
        conversation, one, two = await self.bench.pair(ConversationType.DIRECT)
        await self.restrictions.impose(one.user_id, "messages_per_minute", HOUR, {})
        return conversation, one, two


@pytest.fixture
async def house(
    aging_url: str, valkey_url: str, messaging_db: Database, messaging_cache: Cache
) -> AsyncIterator[House]:
    clock = ManualClock()
    restrictions = Restrictions(messaging_db, messaging_cache, clock, Notices())
    async with Bench(aging_url, valkey_url, restrictions=restrictions) as bench:
        bench.clock.advance(clock.time() - bench.clock.time())
        yield House(bench, restrictions)


async def test_a_restricted_person_does_not_write_to_strangers(house: House) -> None:
    conversation, one, _ = await house.restricted_pair()
    outcome = await house.bench.outcome(one.draft(conversation))
    assert isinstance(outcome, Restricted)
    assert "until" in outcome.fields


async def test_a_restricted_person_writes_to_who_knows_them(house: House) -> None:
    conversation, one, two = await house.restricted_pair()
    house.bench.users.contacts.add((two.user_id, one.user_id))
    assert isinstance(await house.bench.outcome(one.draft(conversation)), SendResult)


async def test_that_they_know_the_other_one_is_not_enough(house: House) -> None:
    conversation, one, two = await house.restricted_pair()
    house.bench.users.contacts.add((one.user_id, two.user_id))
    assert isinstance(await house.bench.outcome(one.draft(conversation)), Restricted)


async def test_a_restricted_person_answers(house: House) -> None:
    conversation, one, two = await house.restricted_pair()
    assert isinstance(await house.bench.outcome(one.draft(conversation)), Restricted)
    assert isinstance(await house.bench.outcome(two.draft(conversation)), SendResult)
    await house.restrictions.reload()
    assert isinstance(await house.bench.outcome(one.draft(conversation)), SendResult)


async def test_a_restricted_person_does_not_write_to_groups(house: House) -> None:
    group, one, two = await house.bench.pair(ConversationType.GROUP)
    assert isinstance(await house.bench.outcome(two.draft(group)), SendResult)
    await house.restrictions.impose(one.user_id, "messages_per_minute", HOUR, {})
    assert isinstance(await house.bench.outcome(one.draft(group)), Restricted)
    assert isinstance(await house.bench.outcome(two.draft(group)), SendResult)


async def test_what_was_sent_before_is_answered_again(house: House) -> None:
    group, one, _ = await house.bench.pair(ConversationType.GROUP)
    draft = one.draft(group)
    first = await house.bench.sending.send(draft)
    await house.restrictions.impose(one.user_id, "messages_per_minute", HOUR, {})
    again = await house.bench.sending.send(draft)
    assert (again.duplicate, again.message.head.id) == (True, first.message.head.id)


async def administrator(stack: Stack, database_url: str) -> Door:
    person = await stack.register()
    await grant_role(database_url, person.username, "admin")
    answer = await stack.http.post(
        f"{stack.auth.url}/api/v1/auth/refresh", json={"refresh_token": person.session["refresh_token"]}
    )
    person.session = answer.json()
    return Door(stack, person)


async def test_administrators_see_and_lift_restrictions(
    stack: Stack,
    database: Callable[[str], str],
    stack_db: Database,
    messaging_cache: Cache,
) -> None:
    admin = await administrator(stack, database("auth"))
    ann, bob = await people(stack, 2)
    restrictions = Restrictions(stack_db, messaging_cache, stack.clock, Notices())
    await restrictions.impose(ann.person.user_id, "messages_per_minute", HOUR, {})
    for answer in (await bob.get("/restrictions"), await ann.delete(f"/restrictions/{ann.id}")):
        assert_problem(answer, 403, "forbidden")
    found: dict[str, Any] = {}
    cursor = None
    while True:
        page = await admin.ok("/restrictions", limit=1, **({"cursor": cursor} if cursor else {}))
        found |= {item["user_id"]: item for item in page["items"]}
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found[ann.id]["reason"] == "messages_per_minute"
    assert bob.id not in found
    assert (await admin.delete(f"/restrictions/{ann.id}")).status_code == 204
    assert_problem(await admin.delete(f"/restrictions/{ann.id}"), 404, "restriction_not_found")
    assert_problem(await admin.get("/restrictions", cursor="nonsense"), 422, "invalid_cursor")


async def test_a_restricted_person_begins_nothing_with_strangers_and_reads_on(
    stack: Stack, stack_db: Database, messaging_cache: Cache
) -> None:
    ann, bob, cid, dan = await people(stack, 4)
    group = await ann.group(bob)
    message = await bob.send(group)
    await stack.http.put(f"{stack.user.url}/api/v1/users/me/contacts/{ann.id}", headers=dan.person.headers)
    restrictions = Restrictions(stack_db, messaging_cache, stack.clock, Notices())
    await restrictions.impose(ann.person.user_id, "approaches_per_hour", HOUR, {})
    async with asyncio.timeout(10):
        while (await ann.post("/messages", ann.draft(group))).status_code != 403:
            await asyncio.sleep(0.05)
    refused = [
        await ann.post("/messages", ann.draft(group)),
        await ann.post("/conversations", {"type": "direct", "member_ids": [cid.id]}),
        await ann.post("/conversations", {"type": "group", "member_ids": [cid.id, dan.id]}),
        await ann.post(f"/conversations/{group}/members", {"member_ids": [cid.id]}),
        await ann.call("PUT", f"/messages/{message['id']}/reactions/x"),
    ]
    for answer in refused:
        assert "until" in assert_problem(answer, 403, "restricted")
        assert int(answer.headers["retry-after"]) > 3_000
    assert (await ann.get(f"/conversations/{group}/messages")).status_code == 200
    assert (await ann.post(f"/conversations/{group}/read", {"seq": 1})).status_code == 204
    direct = await ann.post("/conversations", {"type": "direct", "member_ids": [dan.id]})
    assert direct.status_code == 201
    await ann.send(direct.json()["id"])
