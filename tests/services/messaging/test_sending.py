"""Sending: one set of rules, group commit, and each message exactly once whatever breaks."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from typing import Any, Self
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.services.messaging.rooms import Auth, Device, Users, make_conversation

from whispr.kit.cache import Cache
from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.kit.errors import Failure, RateLimited, SessionRevoked, Unavailable
from whispr.services.messaging.models import (
    BadSignature,
    Blocked,
    ClientIdConflict,
    CommittedEvent,
    ContactsOnly,
    ConversationClosed,
    ConversationType,
    DevicesMismatch,
    Draft,
    InvalidContent,
    NotAllowed,
    NotAMember,
    Permissions,
    ReplyNotFound,
    Role,
    SendResult,
    UnknownUser,
)
from whispr.services.messaging.service import flusher
from whispr.services.messaging.service.contact import Contact
from whispr.services.messaging.service.devices import Devices
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.pace import Rate, SendingPace
from whispr.services.messaging.service.sending import Overloaded, Sending
from whispr.services.messaging.service.signatures import SignatureChecker
from whispr.services.messaging.store import conversations, history, members
from whispr.services.messaging.store.sending import PLANNER


class Bench:
    """A `Sending` with everything around it."""

    def __init__(self, url: str, valkey_url: str, **options: Any) -> None:
        self.clock = ManualClock()
        self.db = Database(url, pool_size=4)
        self.flush_db = Database(url, pool_size=2, settings=PLANNER)
        self.cache = Cache(valkey_url)
        self.auth, self.users = Auth(), Users()
        self.directory = Directory(self.db, self.cache, self.clock)
        self.devices = Devices(self.auth, self.clock)
        self.contact = Contact(self.users, self.clock)
        self.signatures = SignatureChecker(1)
        self.published: list[CommittedEvent] = []
        self.doubts = 0
        self.sending = Sending(
            self.flush_db,
            self.clock,
            self.directory,
            self.devices,
            self.contact,
            self.signatures,
            self.publish,
            self._doubt,
            **options,
        )

    def publish(self, events: list[CommittedEvent]) -> None:
        self.published.extend(events)

    def _doubt(self) -> None:
        self.doubts += 1

    async def __aenter__(self) -> Self:
        await self.db.open()
        await self.flush_db.open()
        self._loop = asyncio.create_task(self.sending.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)
        await self.flush_db.close()
        await self.db.close()
        await self.cache.close()
        await self.signatures.close()

    async def conversation(self, *user_ids: UUID, kind: ConversationType = ConversationType.GROUP) -> UUID:
        return await make_conversation(self.db, self.clock, user_ids, kind)

    async def pair(self, kind: ConversationType = ConversationType.GROUP) -> tuple[UUID, Device, Device]:
        one, two = self.auth.add(), self.auth.add()
        return await self.conversation(one.user_id, two.user_id, kind=kind), one, two

    async def outcome(self, draft: Draft) -> SendResult | Failure:
        try:
            return await self.sending.send(draft)
        except Failure as failure:
            return failure

    async def log(self, conversation_id: UUID) -> list[CommittedEvent]:
        async with self.db.connection() as connection:
            return await history.log(connection, conversation_id, 0, 10_000, 10_000)


@pytest.fixture(scope="session")
async def bench(database: Callable[[str], str], valkey_url: str) -> AsyncIterator[Bench]:
    async with Bench(database("messaging"), valkey_url) as running:
        yield running


def envelopes(*devices: Device, **changes: Any) -> dict[str, Any]:
    return {
        "envelopes": {
            str(device.device_id): {"type": "message", "body": "YQ==", **changes} for device in devices
        }
    }


async def test_first_message_has_seq_one_and_is_published_after_its_commit(bench: Bench) -> None:
    conversation_id, one, _ = await bench.pair()
    draft = one.draft(conversation_id, media_ids=(uuid4(), uuid4()), expires_in=60)
    result = await bench.sending.send(draft)
    assert not result.duplicate
    head = result.message.head
    assert (head.seq, head.client_id, head.sender_id) == (1, draft.client_id, one.user_id)
    assert head.sent_at == bench.clock.now()
    stored = await bench.log(conversation_id)
    assert [event for event in bench.published if event.conversation_id == conversation_id] == stored
    async with bench.db.connection() as connection:
        assert await history.find_message(connection, head.id) == result.message


async def test_replies_are_to_messages_of_the_same_conversation(bench: Bench) -> None:
    conversation_id, one, two = await bench.pair()
    first = (await bench.sending.send(one.draft(conversation_id))).message.head
    reply = await bench.sending.send(two.draft(conversation_id, reply_to_id=first.id))
    assert reply.message.head.reply_to_id == first.id
    with pytest.raises(ReplyNotFound):
        await bench.sending.send(one.draft(conversation_id, reply_to_id=uuid4()))
    away = await bench.conversation(one.user_id)
    with pytest.raises(ReplyNotFound):
        await bench.sending.send(one.draft(away, reply_to_id=first.id))


async def test_nobody_below_the_permitted_role_sends(bench: Bench) -> None:
    conversation_id, one, two = await bench.pair()
    async with bench.db.transaction() as tx:
        await members.set_role(tx, conversation_id, one.user_id, Role.ADMIN)
        await conversations.set_permissions(tx, conversation_id, Permissions(send=Role.ADMIN))
    # The cache still says that everybody may: the statement has the last word.
    with pytest.raises(NotAllowed):
        await bench.sending.send(two.draft(conversation_id))
    bench.directory.clear()
    with pytest.raises(NotAllowed):
        await bench.sending.send(two.draft(conversation_id))
    assert (await bench.sending.send(one.draft(conversation_id))).message.head.seq == 1


async def test_numbers_are_dense_and_in_the_order_of_sending(bench: Bench) -> None:
    conversation_id, one, two = await bench.pair()
    drafts = [(one, two)[n % 2].draft(conversation_id) for n in range(50)]
    results = await asyncio.gather(*(bench.sending.send(draft) for draft in drafts))
    assert [result.message.head.seq for result in results] == list(range(1, 51))


async def test_order_holds_while_the_first_message_waits_for_neighbours(bench: Bench) -> None:
    """The first draft misses everything and loads; the ones behind it must not overtake."""
    conversation_id, one, two = await bench.pair(ConversationType.DIRECT)
    bench.directory.clear()
    seqs: list[tuple[int, int]] = []

    def done(n: int) -> Callable[[SendResult | Failure], None]:
        def note(result: SendResult | Failure) -> None:
            assert isinstance(result, SendResult), result
            seqs.append((n, result.message.head.seq))

        return note

    for n in range(20):
        content = envelopes(two) if n % 3 == 0 else None
        bench.sending.submit(one.draft(conversation_id, content), done(n))
        if n % 5 == 0:
            await asyncio.sleep(0)
    await bench.sending.drain()
    assert seqs == [(n, n + 1) for n in range(20)]


async def test_same_client_id_answers_with_the_first_message(bench: Bench) -> None:
    conversation_id, one, _ = await bench.pair()
    draft = one.draft(conversation_id)
    first, second, third = [
        await bench.sending.send(draft),
        *await asyncio.gather(bench.sending.send(draft), bench.sending.send(draft)),
    ]
    assert not first.duplicate
    assert second.duplicate
    assert third.duplicate
    assert first.message == second.message == third.message
    assert len(await bench.log(conversation_id)) == 1


async def test_duplicates_within_one_batch(bench: Bench) -> None:
    conversation_id, one, _ = await bench.pair()
    draft = one.draft(conversation_id)
    results = await asyncio.gather(*(bench.sending.send(draft) for _ in range(5)))
    assert sorted(result.duplicate for result in results) == [False, True, True, True, True]
    assert {result.message.head.id for result in results} == {results[0].message.head.id}


async def test_client_id_with_other_content_conflicts(bench: Bench) -> None:
    conversation_id, one, two = await bench.pair()
    draft = one.draft(conversation_id)
    await bench.sending.send(draft)
    other = one.draft(conversation_id, client_id=draft.client_id)
    with pytest.raises(ClientIdConflict):
        await bench.sending.send(other)
    # Another device, or another conversation, has client ids of its own.
    assert not (await bench.sending.send(two.draft(conversation_id, client_id=draft.client_id))).duplicate
    elsewhere = await bench.conversation(one.user_id)
    assert not (await bench.sending.send(one.draft(elsewhere, client_id=draft.client_id))).duplicate


async def test_bad_signature_stores_nothing(bench: Bench) -> None:
    conversation_id, one, two = await bench.pair()
    content = {"ciphertext": "YWJj"}
    client_id = uuid4()
    signatures = {
        "by another device": two.sign(conversation_id, client_id, content),
        "of other content": one.sign(conversation_id, client_id, {"ciphertext": "YWJk"}),
        "of another client_id": one.sign(conversation_id, uuid4(), content),
        "of another conversation": one.sign(uuid4(), client_id, content),
        "of nothing": bytes(64),
    }
    for signature in signatures.values():
        with pytest.raises(BadSignature):
            await bench.sending.send(
                one.draft(conversation_id, content, client_id=client_id, signature=signature)
            )
    assert await bench.log(conversation_id) == []


async def test_strangers_and_unknown_conversations_get_one_answer(bench: Bench) -> None:
    conversation_id, _, _ = await bench.pair()
    stranger = bench.auth.add()
    for target in (conversation_id, uuid4()):
        with pytest.raises(NotAMember):
            await bench.sending.send(stranger.draft(target))
    assert await bench.log(conversation_id) == []


async def test_database_refuses_who_left_though_the_cache_does_not_know(bench: Bench) -> None:
    conversation_id, one, two = await bench.pair()
    await bench.sending.send(two.draft(conversation_id))
    async with bench.db.transaction() as tx:
        event = await conversations.append_event(tx, conversation_id, "member_removed", {}, bench.clock.now())
        await members.leave(tx, conversation_id, two.user_id, event.seq, bench.clock.now())
    with pytest.raises(NotAMember):
        await bench.sending.send(two.draft(conversation_id))
    assert (await bench.sending.send(one.draft(conversation_id))).message.head.seq == 3


async def test_closed_conversation_takes_nothing_more(bench: Bench) -> None:
    conversation_id, one, _ = await bench.pair()
    draft = one.draft(conversation_id)
    await bench.sending.send(draft)
    async with bench.db.transaction() as tx:
        await conversations.close(tx, conversation_id)
    for _ in range(2):
        with pytest.raises(ConversationClosed):
            await bench.sending.send(one.draft(conversation_id))
        # What was stored before is acknowledged for ever.
        assert (await bench.sending.send(draft)).duplicate
        bench.directory.clear()


@pytest.mark.parametrize(
    ("reason", "refusal"), [("blocked", Blocked), ("contacts_only", ContactsOnly), ("unknown", UnknownUser)]
)
async def test_direct_messages_need_a_willing_recipient(
    bench: Bench, reason: str, refusal: type[Failure]
) -> None:
    conversation_id, one, two = await bench.pair(ConversationType.DIRECT)
    stored = one.draft(conversation_id)
    await bench.sending.send(stored)
    bench.users.reasons[one.user_id, two.user_id] = reason
    bench.contact.changed(two.user_id)
    with pytest.raises(refusal):
        await bench.sending.send(one.draft(conversation_id))
    assert (await bench.sending.send(stored)).duplicate
    assert len(await bench.log(conversation_id)) == 1


async def test_groups_do_not_ask_who_is_blocked(bench: Bench) -> None:
    conversation_id, one, two = await bench.pair()
    bench.users.reasons[one.user_id, two.user_id] = "blocked"
    await bench.sending.send(one.draft(conversation_id))


async def test_envelopes_must_be_for_exactly_the_current_devices(bench: Bench) -> None:
    conversation_id, one, two = await bench.pair()
    one_too, two_too = bench.auth.add(one.user_id), bench.auth.add(two.user_id)
    stranger = bench.auth.add()
    await bench.sending.send(one.draft(conversation_id, envelopes(two, one_too, two_too)))
    with pytest.raises(DevicesMismatch) as refused:
        await bench.sending.send(one.draft(conversation_id, envelopes(one, two, stranger)))
    assert refused.value.fields == {
        "missing": sorted(str(device.device_id) for device in (one_too, two_too)),
        "owners": {str(device.device_id): str(device.user_id) for device in (one_too, two_too)},
        "extra": sorted(str(device.device_id) for device in (one, stranger)),
        "stale": [],
    }
    reinstalled = envelopes(one_too, two, two_too, registration_id=7)
    await bench.sending.send(one.draft(conversation_id, reinstalled))
    two_too.registration_id = 8
    bench.devices.changed(two.user_id)
    with pytest.raises(DevicesMismatch) as refused:
        await bench.sending.send(one.draft(conversation_id, reinstalled))
    assert refused.value.fields == {
        "missing": [],
        "owners": {},
        "extra": [],
        "stale": [str(two_too.device_id)],
    }
    assert len(await bench.log(conversation_id)) == 2


async def test_our_own_list_may_be_the_one_that_is_behind(bench: Bench) -> None:
    """A device added a moment ago, its hint lost: the sender who knows it already is believed."""
    conversation_id, one, two = await bench.pair()
    await bench.sending.send(one.draft(conversation_id, envelopes(two)))
    added = bench.auth.add(two.user_id)
    bench.clock.advance(2)
    await bench.sending.send(one.draft(conversation_id, envelopes(two, added)))
    newest = bench.auth.add(one.user_id)
    bench.clock.advance(2)
    await bench.sending.send(newest.draft(conversation_id, envelopes(one, two, added)))


async def test_stored_message_is_acknowledged_though_the_devices_changed_since(bench: Bench) -> None:
    conversation_id, one, two = await bench.pair()
    draft = one.draft(conversation_id, envelopes(two))
    await bench.sending.send(draft)
    bench.auth.add(two.user_id)
    bench.devices.changed(two.user_id)
    assert (await bench.sending.send(draft)).duplicate
    with pytest.raises(DevicesMismatch):
        await bench.sending.send(one.draft(conversation_id, envelopes(two)))


async def test_device_that_is_none_of_the_senders(bench: Bench) -> None:
    conversation_id, one, _ = await bench.pair()
    removed = Device(one.user_id)
    with pytest.raises(SessionRevoked):
        await bench.sending.send(removed.draft(conversation_id))


async def test_neighbours_may_be_away_for_a_while(bench: Bench) -> None:
    conversation_id, one, two = await bench.pair(ConversationType.DIRECT)
    await bench.sending.send(one.draft(conversation_id, envelopes(two)))
    bench.auth.away = bench.users.away = True
    try:
        bench.clock.advance(200)
        await bench.sending.send(one.draft(conversation_id, envelopes(two)))
        bench.clock.advance(200)
        with pytest.raises(Unavailable):
            await bench.sending.send(one.draft(conversation_id, envelopes(two)))
    finally:
        bench.auth.away = bench.users.away = False
    bench.clock.advance(10)
    await bench.sending.send(one.draft(conversation_id, envelopes(two)))


async def test_busy_conversation_asks_neighbours_ahead_of_need(bench: Bench) -> None:
    conversation_id, one, two = await bench.pair(ConversationType.DIRECT)
    await bench.sending.send(one.draft(conversation_id, envelopes(two)))
    asked = bench.auth.asked, bench.users.asked
    bench.clock.advance(25)
    answered: list[object] = []
    bench.sending.submit(one.draft(conversation_id, envelopes(two)), answered.append)
    assert not bench.sending._queues, "nothing waits: what is at hand still serves"
    await bench.sending.drain()
    async with asyncio.timeout(5):
        while bench.auth.asked == asked[0] or bench.users.asked == asked[1]:
            await asyncio.sleep(0.01)


async def test_pace_and_backlog_are_bounded(database: Callable[[str], str], valkey_url: str) -> None:
    clock = ManualClock()
    few, many = Rate(2, 3), Rate(100, 100)
    cache = Cache(valkey_url)
    pace = SendingPace(clock, cache, device=few, user=many, member=many, conversation=many)
    async with Bench(database("messaging"), valkey_url, pace=pace, max_backlog=4) as bench:
        conversation_id, one, two = await bench.pair()
        outcomes = await asyncio.gather(*(bench.outcome(one.draft(conversation_id)) for _ in range(4)))
        assert [type(outcome) for outcome in outcomes] == [SendResult] * 3 + [RateLimited]
        assert isinstance(outcomes[3], RateLimited)
        assert outcomes[3].retry_after == 0.5
        clock.advance(0.5)
        await bench.sending.send(one.draft(conversation_id))
        others = [bench.auth.add(two.user_id) for _ in range(6)]
        bench.devices.changed(two.user_id)
        outcomes = await asyncio.gather(*(bench.outcome(device.draft(conversation_id)) for device in others))
        assert [type(outcome) for outcome in outcomes] == [SendResult] * 4 + [Overloaded] * 2
    await cache.close()


async def test_who_comes_behind_a_long_queue_is_refused_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is bounded by the time it takes, not by its length alone: nobody waits for seconds to be refused."""
    monkeypatch.setattr(flusher, "MAX_WAIT", 0.1)
    monkeypatch.setattr(flusher, "MAX_BATCH", 1)
    conversation_id, one, _ = await bench.pair()
    await bench.sending.send(one.draft(conversation_id))
    flood = [asyncio.create_task(bench.outcome(one.draft(conversation_id))) for _ in range(300)]
    late: list[asyncio.Task[SendResult | Failure]] = []
    while not all(task.done() for task in flood):
        await asyncio.sleep(0.02)
        late.append(asyncio.create_task(bench.outcome(one.draft(conversation_id))))
    outcomes = await asyncio.gather(*late)
    assert any(isinstance(outcome, Overloaded) for outcome in outcomes)
    assert {type(task.result()) for task in flood} == {SendResult}
    assert isinstance(await bench.outcome(one.draft(conversation_id)), SendResult)


async def test_nodes_writing_to_one_conversation_share_one_order(
    bench: Bench, database: Callable[[str], str], valkey_url: str
) -> None:
    conversation_id, one, two = await bench.pair()
    async with Bench(database("messaging"), valkey_url) as other:
        other.auth.devices = bench.auth.devices
        drafts = [one.draft(conversation_id) for _ in range(40)]
        # The same device resends everything through another node at the same time.
        results = await asyncio.gather(
            *(node.sending.send(draft) for draft in drafts for node in (bench, other)),
            *(other.sending.send(two.draft(conversation_id)) for _ in range(40)),
        )
        seqs = {result.message.head.id: result.message.head.seq for result in results}
        assert sorted(seqs.values()) == list(range(1, 81))
        fresh = [result for result in results if not result.duplicate]
        assert len(fresh) == 80
        told = [e for node in (bench, other) for e in node.published if e.conversation_id == conversation_id]
        assert sorted(event.seq for event in told) == list(range(1, 81))


async def test_one_unstorable_message_does_not_fail_its_batch(bench: Bench) -> None:
    conversation_id, one, _ = await bench.pair()
    drafts = [one.draft(conversation_id, expires_in=10**12 if n == 2 else None) for n in range(5)]
    outcomes = await asyncio.gather(*(bench.outcome(draft) for draft in drafts))
    kinds = [outcome.code if isinstance(outcome, Failure) else "ok" for outcome in outcomes]
    assert kinds == ["ok", "ok", "internal", "ok", "ok"]
    assert [event.seq for event in await bench.log(conversation_id)] == [1, 2, 3, 4]


async def test_outbox_announces_what_was_stored_in_one_row_a_batch(bench: Bench) -> None:
    conversation_id, one, two = await bench.pair()
    elsewhere = await bench.conversation(one.user_id)
    async with bench.db.connection() as connection:
        before = await connection.fetchval("SELECT coalesce(max(id), 0) FROM outbox")
    draft = one.draft(conversation_id)
    results = await asyncio.gather(
        *(
            bench.sending.send(one_draft)
            for one_draft in (draft, two.draft(conversation_id), one.draft(elsewhere))
        )
    )
    await bench.sending.send(draft)
    async with bench.db.connection() as connection:
        rows = await connection.fetch(
            "SELECT topic, key, payload FROM outbox WHERE id > $1 ORDER BY id", before
        )
    announced = {
        (entry["conversation_id"], seq)
        for row in rows
        for entry in row["payload"]["ranges"]
        for seq in range(entry["first_seq"], entry["last_seq"] + 1)
    }
    assert announced == {(str(conversation_id), 1), (str(conversation_id), 2), (str(elsewhere), 1)}
    assert {row["topic"] for row in rows} == {"message_sent"}
    assert len(rows) <= 3
    assert rows[0]["key"] in {str(result.message.head.id) for result in results}


# --- property: any mixture of good and bad drafts, in any batches ---------------------------------------------------

PEOPLE = 3


class Plan:
    """A drawn draft: who sends what where, under which client id."""

    def __init__(self, room: int, person: int, client: int, content: int, *, forged: bool) -> None:
        self.room, self.person, self.client, self.content, self.forged = room, person, client, content, forged

    def __repr__(self) -> str:
        return f"Plan({self.room}, {self.person}, {self.client}, {self.content}, forged={self.forged})"


plans = st.lists(
    st.lists(
        st.builds(
            Plan,
            st.integers(0, 3),
            st.integers(0, PEOPLE - 1),
            st.integers(0, 4),
            st.integers(0, 1),
            forged=st.sampled_from([False, False, False, True]),
        ),
        min_size=1,
        max_size=12,
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=plans)
async def test_any_drafts_in_any_batches(bench: Bench, batches: list[list[Plan]]) -> None:
    """Room 0 and 1: everybody; 2: without the last person; 3: closed. Each key is stored once, the first to come."""
    people = [bench.auth.add() for _ in range(PEOPLE)]
    ids = [person.user_id for person in people]
    rooms = [
        await bench.conversation(*ids),
        await bench.conversation(*ids),
        await bench.conversation(*ids[:-1]),
    ]
    rooms.append(await bench.conversation(*ids))
    clients = [uuid4() for _ in range(5)]
    # The cache believes that the last person is in room 2 and that room 3 is open: the database must decide.
    for room in rooms:
        await bench.directory.get(room)
    async with bench.db.transaction() as tx:
        await conversations.close(tx, rooms[3])
    stored: dict[tuple[int, int, int], int] = {}
    counts = [0, 0, 0, 0]
    for batch in batches:
        drafts = []
        for plan in batch:
            content = {"ciphertext": base64.b64encode(bytes([plan.content + 1])).decode()}
            signature = bytes(64) if plan.forged else None
            drafts.append(
                people[plan.person].draft(
                    rooms[plan.room], content, client_id=clients[plan.client], signature=signature
                )
            )
        outcomes = await asyncio.gather(*(bench.outcome(draft) for draft in drafts))
        for plan, outcome in zip(batch, outcomes, strict=True):
            key = plan.room, plan.person, plan.client
            if plan.room == 2 and plan.person == PEOPLE - 1:
                assert isinstance(outcome, NotAMember)
            elif plan.forged:
                assert isinstance(outcome, BadSignature | ConversationClosed)
            elif plan.room == 3:
                assert isinstance(outcome, ConversationClosed)
            elif key not in stored:
                counts[plan.room] += 1
                stored[key] = plan.content
                assert isinstance(outcome, SendResult), (plan, outcome)
                assert not outcome.duplicate
                assert outcome.message.head.seq == counts[plan.room]
            elif stored[key] == plan.content:
                assert isinstance(outcome, SendResult), (plan, outcome)
                assert outcome.duplicate
            else:
                assert isinstance(outcome, ClientIdConflict), (plan, outcome)
    for room, count in zip(rooms, counts, strict=True):
        assert [event.seq for event in await bench.log(room)] == list(range(1, count + 1))


async def test_invalid_content_is_refused_at_the_door(bench: Bench) -> None:
    conversation_id, one, _ = await bench.pair()
    with pytest.raises(InvalidContent):
        await bench.sending.send(one.draft(conversation_id, {"text": "hello"}))
