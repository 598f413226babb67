"""Reading the log by REST, and what a device has not acknowledged."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.services.messaging.door import Door, assert_problem, signature_of
from tests.stack import Person, Stack, b64

from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.kit.ids import uuid7
from whispr.services.messaging.models import ConversationType, MemberId, Membership, Role, UndeliveredPage
from whispr.services.messaging.service.history import NEW_DEVICE_WINDOW, History
from whispr.services.messaging.store import conversations, members, receipts


async def pair(stack: Stack) -> tuple[Door, Door, str]:
    ann, bob = (Door(stack, person) for person in await asyncio.gather(stack.register(), stack.register()))
    return ann, bob, await ann.direct(bob)


async def test_a_message_comes_back_as_it_was_sent(stack: Stack) -> None:
    ann, bob, direct = await pair(stack)
    original = (await ann.post("/messages", ann.draft(direct))).json()
    draft = ann.draft(
        direct,
        "hi",
        media_ids=[str(uuid4())],
        expires_in=60,
        expires_from="read",
        reply_to_id=original["id"],
        message_type="media",
    )
    answer = await ann.post("/messages", draft)
    assert answer.status_code == 201
    sent = answer.json()
    for name in (
        "conversation_id",
        "client_id",
        "message_type",
        "content",
        "signature",
        "reply_to_id",
        "media_ids",
        "expires_from",
    ):
        assert sent[name] == draft[name]
    assert (sent["seq"], sent["sender_id"], sent["sender_device_id"]) == (
        2,
        ann.id,
        str(ann.person.device_id),
    )
    assert (sent["edited_at"], sent["is_deleted"], sent["reactions"], sent["expires_in"]) == (
        None,
        False,
        [],
        60,
    )
    history = await bob.ok(f"/conversations/{direct}/messages")
    assert history == {"items": [original, sent], "head_seq": 2}
    _, event = await bob.log(direct)
    assert event == {"seq": 2, "event": "new_message", "payload": sent}
    assert (await bob.ok(f"/conversations/{direct}"))["last_message"] == sent


async def test_sending_again_answers_the_first_message(stack: Stack) -> None:
    ann, _, direct = await pair(stack)
    draft = ann.draft(direct)
    first = await ann.post("/messages", draft)
    again = await ann.post("/messages", draft)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    other = {"ciphertext": b64(b"something else")}
    changed = {
        **draft,
        "content": other,
        "signature": signature_of(ann.person, direct, draft["client_id"], other),
    }
    assert_problem(await ann.post("/messages", changed), 409, "client_id_conflict")
    assert len(await ann.log(direct)) == 1


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"message_type": "video"}, 422, "invalid_message_type"),
        ({"content": {"ciphertext": "not base64!"}}, 422, "invalid_content"),
        ({"content": {}}, 422, "invalid_content"),
        ({"content": {"ciphertext": "QQ==", "envelopes": {}}}, 422, "invalid_content"),
        ({"content": {"ciphertext": "QQ==", "plaintext": "hello"}}, 422, "invalid_content"),
        ({"content": {"ciphertext": "QUFB" * 33_000}}, 413, "too_large"),
        ({"content": "text"}, 422, "invalid_request"),
        ({"signature": b64(bytes(64))}, 422, "bad_signature"),
        ({"signature": b64(bytes(10))}, 422, "bad_signature"),
        ({"signature": "%%%"}, 422, "bad_signature"),
        ({"signature": "ü"}, 422, "bad_signature"),
        ({"client_id": "1"}, 422, "invalid_request"),
        ({"client_id": str(UUID(int=1))}, 422, "bad_signature"),
        ({"conversation_id": None}, 422, "invalid_request"),
        ({"expires_in": 0}, 422, "invalid_request"),
        ({"expires_in": 2**31}, 422, "invalid_request"),
        ({"media_ids": [str(uuid4())] * 101}, 422, "invalid_request"),
        ({"send_at": "2030-01-01T00:00:00Z"}, 422, "invalid_send_at"),
    ],
)
async def test_bad_messages_are_refused(stack: Stack, change: dict[str, Any], status: int, code: str) -> None:
    ann, _, direct = await pair(stack)
    content = change.get("content")
    draft = ann.draft(direct, content=content if isinstance(content, dict) else None)
    answer = await ann.post("/messages", {**draft, **change})
    assert_problem(answer, status, code)
    assert await ann.log(direct) == []


async def test_a_blocked_sender_is_refused(stack: Stack) -> None:
    ann, bob, direct = await pair(stack)
    await stack.http.put(f"{stack.user.url}/api/v1/users/me/blocks/{ann.id}", headers=bob.person.headers)
    assert_problem(await ann.post("/messages", ann.draft(direct)), 403, "blocked")
    assert_problem(await bob.post("/messages", bob.draft(direct)), 403, "blocked")


async def test_each_device_reads_its_own_envelope(stack: Stack) -> None:
    ann, bob, direct = await pair(stack)
    bob2: Person = await stack.add_device(bob.person)
    ann2: Person = await stack.add_device(ann.person)
    devices = [bob.person, bob2, ann2]
    envelopes = {
        str(device.device_id): {"type": "message", "body": b64(device.device_id.bytes)} for device in devices
    }
    sent = await ann.post("/messages", ann.draft(direct, content={"envelopes": envelopes}))
    assert sent.status_code == 201, sent.text
    assert sent.json()["content"] == {"envelopes": {}}
    for person in devices:
        door = Door(stack, person)
        own = {"envelopes": {str(person.device_id): envelopes[str(person.device_id)]}}
        page = await door.ok(f"/conversations/{direct}/messages")
        assert page["items"][0]["content"] == own
        assert (await door.log(direct))[0]["payload"]["content"] == own
        assert (await door.ok("/conversations"))["items"][0]["last_message"]["content"] == own
        foreign = [text for text in envelopes if text != str(person.device_id)]
        answer = await door.get(f"/conversations/{direct}/messages")
        assert not any(device in answer.text for device in foreign if device != str(ann.person.device_id))


async def test_envelopes_for_other_devices_are_refused(stack: Stack) -> None:
    ann, bob, direct = await pair(stack)
    stranger = str(uuid4())
    content = {"envelopes": {stranger: {"type": "message", "body": "QQ=="}}}
    answer = await ann.post("/messages", ann.draft(direct, content=content))
    body = assert_problem(answer, 409, "devices_mismatch")
    assert (body["missing"], body["extra"], body["stale"]) == ([str(bob.person.device_id)], [stranger], [])
    assert await ann.log(direct) == []


async def test_pages_both_ways(stack: Stack) -> None:
    ann, bob, direct = await pair(stack)
    for number in range(1, 6):
        await ann.send(direct, str(number))
    await ann.patch(f"/conversations/{direct}", {"metadata": {"x": 1}})
    await ann.send(direct, "7")

    async def seqs(**query: int) -> list[int]:
        page = await bob.ok(f"/conversations/{direct}/messages", **query)
        assert page["head_seq"] == 7
        return [item["seq"] for item in page["items"]]

    assert await seqs() == [1, 2, 3, 4, 5, 7]
    assert await seqs(limit=2) == [5, 7]
    assert await seqs(after_seq=0, limit=2) == [1, 2]
    assert await seqs(after_seq=4) == [5, 7]
    assert await seqs(after_seq=7) == []
    assert await seqs(after_seq=99) == []
    assert await seqs(before_seq=5, limit=2) == [3, 4]
    assert await seqs(before_seq=1) == []
    assert await seqs(before_seq=99, limit=1) == [7]
    assert await seqs(after_seq=1, before_seq=7, limit=2) == [4, 5]


async def test_the_event_log_pages_without_holes(stack: Stack) -> None:
    ann, bob, direct = await pair(stack)
    for number in range(3):
        await ann.send(direct, str(number))
        await bob.patch(f"/conversations/{direct}", {"metadata": {"n": number}})
    first = await bob.ok(f"/conversations/{direct}/events", limit=4)
    assert [(e["seq"], e["event"]) for e in first["items"]] == [
        (1, "new_message"),
        (2, "conversation_updated"),
        (3, "new_message"),
        (4, "conversation_updated"),
    ]
    assert (first["head_seq"], first["more"]) == (6, True)
    rest = await bob.ok(f"/conversations/{direct}/events", after_seq=4, limit=4)
    assert [e["seq"] for e in rest["items"]] == [5, 6]
    assert rest["more"] is False
    assert UUID(rest["epoch"]) == UUID(first["epoch"])
    beyond = await bob.ok(f"/conversations/{direct}/events", after_seq=6)
    assert (beyond["items"], beyond["more"]) == ([], False)


@pytest.mark.parametrize(
    "query", [{"after_seq": -1}, {"after_seq": 2**63}, {"limit": 0}, {"limit": 101}, {"after_seq": "x"}]
)
async def test_bad_ranges_are_refused(stack: Stack, query: dict[str, Any]) -> None:
    ann, _, direct = await pair(stack)
    assert_problem(await ann.get(f"/conversations/{direct}/messages", **query), 422, "invalid_request")
    assert_problem(await ann.get(f"/conversations/{direct}/events", **query), 422, "invalid_request")


# --- what a device has not acknowledged -------------------------------------------------------------------------------


async def room(db: Database, user_id: UUID, events: int, floor: int = 0) -> UUID:
    conversation_id = uuid7()
    now = ManualClock().now()
    async with db.transaction() as tx:
        await conversations.insert(tx, conversation_id, ConversationType.GROUP, user_id, {}, now)
        if floor:
            await add_events(db, tx, conversation_id, floor)
            await members.join(tx, conversation_id, [user_id], Role.MEMBER, [floor], now)
        else:
            await members.insert_founders(tx, conversation_id, [(user_id, Role.OWNER)], now)
        await add_events(db, tx, conversation_id, events)
    return conversation_id


async def add_events(db: Database, tx: Any, conversation_id: UUID, count: int) -> None:
    if count:
        await conversations.append_events(
            tx, conversation_id, [("conversation_updated", {})] * count, ManualClock().now()
        )


async def undelivered(db: Database, user_id: UUID, device_id: UUID, limit: int = 50) -> list[UndeliveredPage]:
    return [page async for page in History(db).undelivered(user_id, device_id, limit)]


async def test_undelivered_events_come_by_conversation_and_page(messaging_db: Database) -> None:
    user, device = uuid4(), uuid4()
    rooms = [await room(messaging_db, user, events) for events in (5, 0, 3)]
    pages = await undelivered(messaging_db, user, device, limit=2)
    assert [(p.conversation_id, [e.seq for e in p.items], p.more) for p in pages] == [
        (rooms[0], [1, 2], True),
        (rooms[0], [3, 4], True),
        (rooms[0], [5], False),
        (rooms[2], [1, 2], True),
        (rooms[2], [3], False),
    ]
    assert not any(page.truncated for page in pages)


async def test_acknowledged_events_do_not_come_again(messaging_db: Database) -> None:
    user, device, other_device = uuid4(), uuid4(), uuid4()
    conversation = await room(messaging_db, user, 4)
    async with messaging_db.transaction() as tx:
        await receipts.advance_cursors(tx, [device], [conversation], [user], [3], ManualClock().now())
    (page,) = await undelivered(messaging_db, user, device)
    assert [event.seq for event in page.items] == [4]
    (page,) = await undelivered(messaging_db, user, other_device)
    assert [event.seq for event in page.items] == [1, 2, 3, 4]


async def test_a_new_device_starts_near_the_head(messaging_db: Database) -> None:
    user = uuid4()
    await room(messaging_db, user, NEW_DEVICE_WINDOW + 10)
    pages = await undelivered(messaging_db, user, uuid4(), limit=100)
    assert [event.seq for page in pages for event in page.items] == list(range(11, NEW_DEVICE_WINDOW + 11))
    assert all(page.truncated for page in pages)


async def test_the_floor_holds_for_undelivered_events(messaging_db: Database) -> None:
    user = uuid4()
    await room(messaging_db, user, 2, floor=300)
    (page,) = await undelivered(messaging_db, user, uuid4())
    assert [event.seq for event in page.items] == [301, 302]
    assert page.truncated is False


async def test_who_is_removed_meanwhile_gets_no_further_page(messaging_db: Database) -> None:
    user = uuid4()
    conversation = await room(messaging_db, user, 4)
    seen = []
    async for page in History(messaging_db).undelivered(user, uuid4(), 2):
        seen.append(page)
        async with messaging_db.transaction() as tx:
            await members.leave(tx, conversation, user, 4, ManualClock().now())
    assert [[event.seq for event in page.items] for page in seen] == [[1, 2]]


async def test_more_conversations_than_one_query_lists(messaging_db: Database) -> None:
    user = uuid4()
    rooms = [await room(messaging_db, user, 1) for _ in range(105)]
    pages = await undelivered(messaging_db, user, uuid4())
    assert sorted(page.conversation_id for page in pages) == sorted(rooms)


async def test_events_up_to_a_bound(messaging_db: Database) -> None:
    user = uuid4()
    conversation = await room(messaging_db, user, 10)
    membership = Membership(conversation, MemberId(user), Role.OWNER, 0)
    history = History(messaging_db)
    page = await history.events(membership, after_seq=2, until_seq=5, limit=2)
    assert ([event.seq for event in page.items], page.more, page.head_seq) == ([3, 4], True, 10)
    page = await history.events(membership, after_seq=4, until_seq=5, limit=2)
    assert ([event.seq for event in page.items], page.more) == ([5], False)
    assert await history.heads([conversation, uuid4()]) == {conversation: 10}
