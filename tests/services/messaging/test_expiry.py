"""Disappearing messages: they go on time, once, and altogether."""

from __future__ import annotations

import asyncio
import base64
import struct
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.services.messaging.ages import Ages, Node
from tests.services.messaging.door import Door
from tests.services.messaging.line import Line
from tests.stack import Stack

from whispr.kit.errors import Unavailable
from whispr.services.messaging.models import MessageHead, Role
from whispr.services.messaging.service import expiry as module
from whispr.services.messaging.service.housekeeping import Housekeeping
from whispr.services.messaging.store import changes, members
from whispr.services.messaging.store import expiry as store


def told(node: Node, conversation_id: UUID) -> list[tuple[int, str, Any]]:
    return [
        (event.seq, event.event, msgspec.json.decode(event.payload))
        for event in node.published
        if event.conversation_id == conversation_id
    ]


async def is_erased(ages: Ages, head: MessageHead) -> bool:
    found = await ages.head(head.id)
    assert found is not None
    if not found.is_deleted:
        assert found.content_sha256 == b"digest"
        return False
    assert (found.content_sha256, found.signature, found.media_ids) == (b"", b"", ())
    return True


async def test_a_message_goes_when_its_seconds_since_sending_are_over(ages: Ages) -> None:
    node, ann, bob = ages.node(), uuid4(), uuid4()
    direct = await ages.direct(ann, bob)
    kept = await ages.send(direct, ann)
    short = await ages.send(direct, ann, expires_in=10)
    long = await ages.send(direct, bob, expires_in=20)
    assert short.expires_at == ages.clock.now() + timedelta(seconds=10)
    ages.clock.advance(9.999)
    assert await node.expiry.erase_due() == 0
    ages.clock.advance(0.001)
    assert await node.expiry.erase_due() == 1
    assert [await is_erased(ages, head) for head in (kept, short, long)] == [False, True, False]
    payload = {"seq": 4, "message_id": str(short.id), "deleted_by": None, "reason": "expired"}
    assert told(node, direct) == [(4, "message_deleted", payload)]
    assert [event.seq for event in await ages.log(direct)] == [1, 2, 3, 4]
    assert node.woken == 1
    ages.clock.advance(10)
    assert await node.expiry.erase_due() == 1
    assert await node.expiry.erase_due() == 0
    assert [seq for seq, _, _ in told(node, direct)] == [4, 5]


async def test_seconds_from_reading_begin_when_the_last_one_has_read(ages: Ages) -> None:
    node, ann, bob, cid = ages.node(), uuid4(), uuid4(), uuid4()
    group = await ages.group(ann, bob, cid)
    head = await ages.send(group, ann, expires_in=10, from_read=True)
    later = await ages.send(group, bob, expires_in=10, from_read=True)
    ages.clock.advance(3600)
    await ages.read(node, group, ann, 2)
    await ages.read(node, group, bob, 2)
    found = await ages.head(head.id)
    assert found is not None
    assert found.expires_at is msgspec.UNSET
    await ages.read(node, group, cid, 1)
    found = await ages.head(head.id)
    assert found is not None
    assert found.expires_at == ages.clock.now() + timedelta(seconds=10)
    ages.clock.advance(10)
    assert await node.expiry.erase_due() == 1
    assert [await is_erased(ages, one) for one in (head, later)] == [True, False]


async def test_whoever_leaves_is_not_waited_for(ages: Ages) -> None:
    node, ann, bob, cid = ages.node(), uuid4(), uuid4(), uuid4()
    group = await ages.group(ann, bob, cid)
    head = await ages.send(group, ann, expires_in=5, from_read=True)
    await ages.read(node, group, bob, 1)
    await ages.leave(group, cid)
    node.expiry.reconsider(group)
    assert await node.expiry.begin_seconds() == 1
    found = await ages.head(head.id)
    assert found is not None
    assert found.expires_at == ages.clock.now() + timedelta(seconds=5)


async def test_whoever_came_later_is_not_waited_for(ages: Ages) -> None:
    node, ann, bob, cid = ages.node(), uuid4(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    await ages.send(group, ann, expires_in=5, from_read=True)
    async with ages.db.transaction() as tx:
        await members.join(tx, group, [cid], Role.MEMBER, [1], ages.clock.now())
        await tx.execute("UPDATE conversation_members SET read_seq = 0 WHERE user_id = $1", cid)
    await ages.read(node, group, bob, 1)
    assert await ages.fetchval("SELECT expires_at FROM messages WHERE conversation_id = $1", group)


async def test_a_message_to_nobody_begins_at_once(ages: Ages) -> None:
    node, ann = ages.node(), uuid4()
    group = await ages.group(ann)
    head = await ages.send(group, ann, expires_in=5, from_read=True)
    node.expiry.expects(head)
    assert await node.expiry.begin_seconds() == 1


async def test_what_a_crash_left_undone_is_found_by_the_sweep(
    ages: Ages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CONVERSATIONS_AT_ONCE", 2)
    crashed, ann, bob = ages.node(), uuid4(), uuid4()
    groups = [await ages.group(ann, bob) for _ in range(5)]
    heads = [await ages.send(group, ann, expires_in=5, from_read=True) for group in groups]
    crashed.receipts._sinks.clear()
    for group in groups[:4]:
        await ages.read(crashed, group, bob, 1)
    assert await ages.node().expiry.sweep() == 4
    assert await ages.node().expiry.sweep() == 0
    ages.clock.advance(5)
    await ages.node().expiry.erase_due()
    assert [await is_erased(ages, head) for head in heads] == [True] * 4 + [False]


async def test_two_people_who_read_at_once_on_two_nodes(ages: Ages) -> None:
    ann, bob, cid = uuid4(), uuid4(), uuid4()
    one, other = ages.node(), ages.node()
    group = await ages.group(ann, bob, cid)
    for seq in range(1, 21):
        await ages.send(group, ann, expires_in=5, from_read=True)
        await asyncio.gather(ages.read(one, group, bob, seq), ages.read(other, group, cid, seq))
        begun = await ages.fetchval(
            "SELECT count(expires_at) FROM messages WHERE conversation_id = $1", group
        )
        assert begun == seq


async def test_many_nodes_erase_each_message_once(ages: Ages) -> None:
    nodes = [ages.node() for _ in range(3)]
    ann, bob = uuid4(), uuid4()
    groups = [await ages.group(ann, bob) for _ in range(6)]
    for group in groups:
        for _ in range(5):
            await ages.send(group, ann, expires_in=5)
    ages.clock.advance(5)
    erased = await asyncio.gather(*(node.expiry.erase_due() for node in nodes))
    assert sum(erased) == 30
    for group in groups:
        events = [event for node in nodes for event in node.published if event.conversation_id == group]
        assert sorted(event.seq for event in events) == [6, 7, 8, 9, 10]
        assert [event.seq for event in await ages.log(group)] == list(range(1, 11))


async def test_a_conversation_in_other_hands_waits_but_not_for_long(ages: Ages) -> None:
    node, ann, bob = ages.node(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    head = await ages.send(group, ann, expires_in=5)
    ages.clock.advance(5)
    async with ages.db.transaction() as tx:
        await tx.execute("SELECT FROM conversations WHERE id = $1 FOR UPDATE", group)
        assert await node.expiry.erase_due() == 0
        ages.clock.advance(2)
        waiting = asyncio.create_task(node.expiry.erase_due())
        await asyncio.sleep(0.1)
        assert not waiting.done()
    assert await asyncio.wait_for(waiting, 5) == 1
    assert await is_erased(ages, head)


@pytest.mark.parametrize("step", ["hold", "due_messages", "tombstone", "append_silently", "publish"])
async def test_a_crash_at_any_step_costs_nothing(
    ages: Ages, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    node, ann, bob = ages.node(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    head = await ages.send(group, ann, expires_in=5, media_ids=[uuid4()])
    ages.clock.advance(5)

    async def crash(*_: Any, **__: Any) -> Any:
        raise Unavailable

    def crash_at_once(*_: Any) -> None:
        raise Unavailable

    with monkeypatch.context() as patch:
        if step == "publish":
            patch.setattr(node.expiry, "_publish", crash_at_once)
        else:
            patch.setattr(changes if step == "tombstone" else store, step, crash)
        with pytest.raises(Unavailable):
            await node.expiry.erase_due()
    # What was committed and not told is told by comparing heads; what was not committed is still to do.
    assert node.doubts == 1
    await ages.node().expiry.erase_due()
    assert await is_erased(ages, head)
    assert [event.event for event in await ages.log(group)] == ["new_message", "message_deleted"]
    rows = await ages.fetchval(
        "SELECT count(*) FROM outbox WHERE topic = 'media_unlinked' AND payload::text LIKE $1", f"%{head.id}%"
    )
    assert rows == 1


async def test_one_conversation_that_fails_does_not_keep_the_others(
    ages: Ages, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, ann, bob = ages.node(), uuid4(), uuid4()
    bad, good = await ages.group(ann, bob), await ages.group(ann, bob)
    heads = [await ages.send(group, ann, expires_in=5) for group in (bad, good)]
    ages.clock.advance(5)
    erase = changes.tombstone

    async def fail(tx: Any, conversation_id: UUID, message_ids: Any) -> Any:
        if conversation_id == bad:
            raise RuntimeError("a defect")
        return await erase(tx, conversation_id, message_ids)

    with monkeypatch.context() as patch:
        patch.setattr(changes, "tombstone", fail)
        assert await node.expiry.erase_due() == 1
    assert [await is_erased(ages, head) for head in heads] == [False, True]
    assert await node.expiry.erase_due() == 1


async def test_expiry_is_no_news(ages: Ages) -> None:
    node, ann, bob = ages.node(), uuid4(), uuid4()
    direct = await ages.direct(ann, bob)
    await ages.send(direct, ann, expires_in=5)
    sent_at = ages.clock.now()
    async with ages.db.transaction() as tx:
        await members.hide(tx, direct, bob, 1)
    ages.clock.advance(5)
    assert await node.expiry.erase_due() == 1
    query = "SELECT updated_at FROM conversations WHERE id = $1"
    assert await ages.fetchval(query, direct) == sent_at
    hidden = "SELECT hidden_seq FROM conversation_members WHERE conversation_id = $1 AND user_id = $2"
    assert await ages.fetchval(hidden, direct, bob) == 2
    assert await ages.fetchval(hidden, direct, ann) is None


async def test_reactions_pins_and_media_go_with_the_message(ages: Ages) -> None:
    node, ann, bob, medium = ages.node(), uuid4(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    head = await ages.send(group, ann, expires_in=5, media_ids=[medium])
    async with ages.db.connection() as connection:
        await connection.execute(
            "INSERT INTO message_reactions VALUES ($1, $2, $3, 'x', 2, now())", group, head.id, bob
        )
        await connection.execute("INSERT INTO message_pins VALUES ($1, $2, $3, now())", group, head.id, bob)
    ages.clock.advance(5)
    await node.expiry.erase_due()
    for table in ("message_reactions", "message_pins", "message_media"):
        assert await ages.fetchval(f"SELECT count(*) FROM {table} WHERE message_id = $1", head.id) == 0
    payload = await ages.fetchval(
        "SELECT payload FROM outbox WHERE topic = 'media_unlinked' AND payload::text LIKE $1", f"%{head.id}%"
    )
    assert payload == {
        "links": [
            {
                "message_id": str(head.id),
                "conversation_id": str(group),
                "sender_id": str(ann),
                "media_ids": [str(medium)],
            }
        ]
    }


def tuples_of(page: bytes) -> list[bytes]:
    """What the line pointers of a heap page lead to, dead row versions included."""
    lower = struct.unpack_from("<H", page, 12)[0]
    found = []
    for at in range(24, lower, 4):
        pointer = struct.unpack_from("<I", page, at)[0]
        offset, flags, length = pointer & 0x7FFF, (pointer >> 15) & 3, pointer >> 17
        if flags == 1:
            found.append(page[offset : offset + length])
    return found


async def test_nothing_of_the_content_is_left_in_the_tables(ages: Ages) -> None:
    node, ann, bob = ages.node(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    secrets = [uuid4().hex * size for size in (3, 400)]  # in its row, and stored beside it in pieces
    for secret in secrets:
        content = b'{"ciphertext":"%b"}' % base64.b64encode(secret.encode())
        await ages.send(group, ann, content, expires_in=5)
        assert content.hex() in await ages.everything()
    ages.clock.advance(5)
    await node.expiry.erase_due()
    everything = await ages.everything()
    for secret in secrets:
        assert base64.b64encode(secret.encode()).hex() not in everything

    async def stored(secret: str) -> int:
        """In how many row versions of all tables and their TOAST tables the content's beginning stands."""
        beginning = base64.b64encode(secret.encode())[:40]
        async with ages.db.connection() as connection:
            await connection.execute("CHECKPOINT")
            folder = Path(await connection.fetchval("SHOW data_directory"))
            files = await connection.fetch(
                "SELECT pg_relation_filepath(oid) AS path FROM pg_class WHERE relkind IN ('r', 't')"
                " AND pg_relation_filepath(oid) IS NOT NULL"
            )
        count = 0
        for record in files:
            path = folder / record["path"]
            data = path.read_bytes() if path.exists() else b""
            pages = (data[at : at + 8192] for at in range(0, len(data), 8192))
            count += sum(beginning in row for page in pages for row in tuples_of(page))
        return count

    assert await stored(secrets[0]) == 1, "the test would see it if it were there"
    housekeeping = Housekeeping(
        ages.db,
        ages.clock,
        receipt_detail=timedelta(days=3000),
        cursor_life=timedelta(days=3000),
    )
    # A session that ends tells PostgreSQL's statistics what it did.
    await ages.db.close()
    await ages.db.open()
    await housekeeping.run_once()
    assert [await stored(secret) for secret in secrets] == [0, 0]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.integers(1, 8), st.booleans(), st.integers(0, 2)),
            st.tuples(st.just("read"), st.integers(0, 2), st.integers(1, 12)),
            st.tuples(st.just("leave"), st.integers(1, 2)),
            st.tuples(st.just("wait"), st.integers(1, 5)),
        ),
        max_size=25,
    )
)
async def test_every_message_lives_exactly_as_long_as_it_should(
    ages: Ages, steps: list[tuple[Any, ...]]
) -> None:
    """Against a model: who is there, how far each has read, and when each message's seconds began."""
    node = ages.node()
    people = [uuid4() for _ in range(3)]
    group = await ages.group(*people)
    read = dict.fromkeys(people, 0)
    here = set(people)
    ends: dict[UUID, tuple[int, UUID, int, datetime | None]] = {}

    def begin() -> None:
        for key, (seq, sender, seconds, end) in ends.items():
            if end is None and all(read[one] >= seq for one in here if one != sender):
                ends[key] = (seq, sender, seconds, ages.clock.now() + timedelta(seconds=seconds))

    for step, *rest in steps:
        if step == "send" and people[rest[2]] in here:
            seconds, from_read, by = rest
            head = await ages.send(group, people[by], expires_in=seconds, from_read=from_read)
            end = None if from_read else ages.clock.now() + timedelta(seconds=seconds)
            ends[head.id] = (head.seq, people[by], seconds, end)
            node.expiry.expects(head)
            await node.expiry.begin_seconds()
        elif step == "read" and people[rest[0]] in here:
            last = await ages.fetchval("SELECT last_seq FROM conversations WHERE id = $1", group)
            read[people[rest[0]]] = max(read[people[rest[0]]], min(rest[1], last))
            await ages.read(node, group, people[rest[0]], rest[1])
        elif step == "leave" and people[rest[0]] in here:
            here.discard(people[rest[0]])
            await ages.leave(group, people[rest[0]])
            node.expiry.reconsider(group)
            await node.expiry.begin_seconds()
        elif step == "wait":
            ages.clock.advance(rest[0])
        begin()
        await node.expiry.erase_due()
        for message_id, (_, _, _, end) in ends.items():
            found = await ages.head(message_id)
            assert found is not None
            assert found.is_deleted is (end is not None and end <= ages.clock.now())
    deleted = [
        msgspec.json.decode(e.payload)["message_id"]
        for e in await ages.log(group)
        if e.event == "message_deleted"
    ]
    assert len(deleted) == len(set(deleted))
    assert [event.seq for event in await ages.log(group)] == list(range(1, len(await ages.log(group)) + 1))


async def test_the_loop_sleeps_until_the_next_and_is_woken_by_an_earlier_one(
    ages: Ages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 60.0)
    node, ann, bob = ages.node(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    running = asyncio.create_task(node.expiry.run())
    await asyncio.sleep(0.4)
    # The clock of the test stands still, so the loop waits by the machine's: one second, and the message is not due yet.
    head = await ages.send(group, ann, expires_in=1)
    node.expiry.expects(head)
    await asyncio.sleep(0.3)
    ages.clock.advance(1)
    async with asyncio.timeout(3):
        while not await is_erased(ages, head):
            await asyncio.sleep(0.02)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_message_stored_while_the_loop_looks_is_not_forgotten(
    ages: Ages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 60.0)
    node, ann, bob = ages.node(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    find = store.next_due
    sent: list[MessageHead] = []

    async def find_slowly(connection: Any) -> Any:
        found = await find(connection)
        if not sent:
            sent.append(await ages.send(group, ann, expires_in=1))
            node.expiry.expects(sent[0])
        return found

    monkeypatch.setattr(store, "next_due", find_slowly)
    running = asyncio.create_task(node.expiry.run())
    async with asyncio.timeout(5):
        while not sent:
            await asyncio.sleep(0.02)
        ages.clock.advance(1)
        while not await is_erased(ages, sent[0]):
            await asyncio.sleep(0.02)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_loop_goes_on_after_the_database_was_away(
    ages: Ages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 60.0)
    node, ann, bob = ages.node(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    head = await ages.send(group, ann, expires_in=1)
    ages.clock.advance(1)
    find, failures = store.due_conversations, 3

    async def away(*arguments: Any) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise Unavailable
        return await find(*arguments)

    monkeypatch.setattr(store, "due_conversations", away)
    running = asyncio.create_task(node.expiry.run())
    async with asyncio.timeout(5):
        while not await is_erased(ages, head):
            await asyncio.sleep(0.02)
    assert failures == 0
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_readings_cost_one_look_where_nothing_disappears(
    ages: Ages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 60.0)
    monkeypatch.setattr(module, "GATHER_SECONDS", 0.01)
    node, ann, bob = ages.node(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    head = await ages.send(group, ann)
    looks = {"any_awaits_readers": 0, "start_seconds": 0, "due_conversations": 0, "next_due": 0}
    for name in looks:
        real = getattr(store, name)

        async def counted(*arguments: Any, name: str = name, real: Any = real) -> Any:
            looks[name] += 1
            return await real(*arguments)

        monkeypatch.setattr(store, name, counted)
    running = asyncio.create_task(node.expiry.run())
    async with asyncio.timeout(5):
        while looks["next_due"] == 0:
            await asyncio.sleep(0.01)
        while looks["any_awaits_readers"] < 5:
            node.expiry.reconsider(group)
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (looks["start_seconds"], looks["due_conversations"], looks["next_due"]) == (0, 1, 1)
    assert head.expires_in is None


async def test_everybody_sees_a_message_disappear(stack: Stack) -> None:
    ann, bob = (Door(stack, one) for one in await asyncio.gather(stack.register(), stack.register()))
    direct = await ann.direct(bob)
    line = await Line.open(stack.messaging, bob.person)
    topic = f"conversation:{direct}"
    await line.join(topic)
    answer = await ann.post("/messages", ann.draft(direct, expires_in=2))
    assert answer.status_code == 201
    sent = answer.json()
    read = (await ann.post("/messages", ann.draft(direct, expires_in=2, expires_from="read"))).json()
    assert (sent["expires_from"], read["expires_from"]) == ("sent", "read")
    stack.clock.advance(3)
    gone = await line.next(topic, "message_deleted", timeout=20)
    assert (gone["message_id"], gone["deleted_by"], gone["reason"]) == (sent["id"], None, "expired")
    first, second = (await bob.ok(f"/conversations/{direct}/messages"))["items"]
    assert (first["is_deleted"], first["content"], first["signature"]) == (True, {}, "")
    assert second["is_deleted"] is False
    await bob.post(f"/conversations/{direct}/read", {"seq": 2})
    async with asyncio.timeout(20):
        while "expires_at" not in (await ann.ok(f"/conversations/{direct}/messages"))["items"][1]:
            await asyncio.sleep(0.05)
    stack.clock.advance(3)
    gone = await line.next(topic, "message_deleted", timeout=20)
    assert gone["message_id"] == read["id"]
    await line.close()
