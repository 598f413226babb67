"""What is older than a conversation or the server keeps is purged, and everybody is told."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.services.messaging.ages import Ages, Node
from tests.services.messaging.door import Door, assert_problem
from tests.services.messaging.line import Line
from tests.stack import Stack

from whispr.kit.db import Database
from whispr.kit.errors import Unavailable
from whispr.services.messaging.service import retention as module
from whispr.services.messaging.store import expiry as store

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


async def keep(ages: Ages, conversation_id: UUID, seconds: int | None) -> None:
    async with ages.db.transaction() as tx:
        await store.set_retention(tx, conversation_id, seconds)


async def left(ages: Ages, conversation_id: UUID) -> list[tuple[int, str]]:
    return [(event.seq, event.event) for event in await ages.log(conversation_id)]


def told(node: Node, conversation_id: UUID) -> list[dict[str, Any]]:
    events = [event for event in node.published if event.conversation_id == conversation_id]
    assert {event.event for event in events} <= {"history_purged"}
    return [msgspec.json.decode(event.payload) for event in events]


async def test_what_is_too_old_goes_and_the_rest_stays(ages: Ages) -> None:
    node, ann, bob = ages.node(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    await keep(ages, group, 3600)
    await ages.send(group, ann)
    await ages.append(group, "conversation_updated", {"metadata": {}})
    await ages.send(group, bob)
    ages.clock.advance(1800)
    young = await ages.send(group, bob)
    ages.clock.advance(1800)
    assert await node.retention.purge_outdated() == 0
    ages.clock.advance(1)
    assert await node.retention.purge_outdated() == 3
    assert await left(ages, group) == [(4, "new_message"), (5, "history_purged")]
    assert told(node, group) == [{"seq": 5, "until_seq": 3}]
    assert await ages.fetchval("SELECT purged_seq FROM conversations WHERE id = $1", group) == 3
    assert await node.retention.purge_outdated() == 0
    assert await ages.head(young.id) is not None


async def test_nothing_is_purged_where_nobody_asked_for_it(ages: Ages) -> None:
    node, ann, bob = ages.node(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    await ages.send(group, ann)
    ages.clock.advance(10 * 366 * 86400)
    assert await node.retention.purge_outdated() == 0
    assert await left(ages, group) == [(1, "new_message")]


async def test_the_shorter_limit_counts(ages: Ages) -> None:
    ann, bob = uuid4(), uuid4()
    short, long, none = [await ages.group(ann, bob) for _ in range(3)]
    await keep(ages, short, 3600)
    await keep(ages, long, 10 * 86400)
    for group in (short, long, none):
        await ages.send(group, ann)
    node = ages.node(longest=DAY)
    purged = []
    for advance in (2 * HOUR, DAY):
        ages.clock.advance(advance.total_seconds())
        await node.retention.purge_outdated()
        purged.append([len(told(node, group)) for group in (short, long, none)])
    assert purged == [[1, 0, 0], [1, 1, 1]]


async def test_word_of_a_purge_is_not_a_reason_for_the_next(ages: Ages) -> None:
    node, ann, bob = ages.node(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    await keep(ages, group, 3600)
    await ages.send(group, ann)
    for _ in range(4):
        ages.clock.advance(7200)
        await node.retention.purge_outdated()
    assert await left(ages, group) == [(2, "history_purged")]
    async with ages.db.connection() as connection:
        page = await store.outdated_conversations(connection, UUID(int=0), ages.clock.now(), None, 100)
    assert page.conversation_ids == []
    await ages.send(group, ann)
    ages.clock.advance(7200)
    await node.retention.purge_outdated()
    assert await left(ages, group) == [(4, "history_purged")]


async def test_all_that_hangs_on_a_message_goes_with_it(ages: Ages) -> None:
    node, ann, bob, medium = ages.node(), uuid4(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    await keep(ages, group, 3600)
    old = await ages.send(group, ann, media_ids=[medium])
    await ages.read(node, group, bob, 1)
    ages.clock.advance(3000)
    young = await ages.send(group, ann, media_ids=[medium])
    await ages.read(node, group, bob, 2)
    async with ages.db.connection() as connection:
        for head in (old, young):
            await connection.execute(
                "INSERT INTO message_reactions VALUES ($1, $2, $3, 'x', 9, now())", group, head.id, bob
            )
            await connection.execute(
                "INSERT INTO message_pins VALUES ($1, $2, $3, now())", group, head.id, bob
            )
    ages.clock.advance(1000)
    assert await node.retention.purge_outdated() == 1
    for table in ("message_reactions", "message_pins", "message_media"):
        rows = "SELECT array_agg(message_id) FROM {} WHERE conversation_id = $1"
        assert await ages.fetchval(rows.format(table), group) == [young.id], table
    marks = "SELECT array_agg(DISTINCT seq) FROM receipt_marks WHERE conversation_id = $1"
    assert await ages.fetchval(marks, group) == [2]
    unlinked = await ages.fetchval(
        "SELECT jsonb_agg(payload -> 'links') FROM outbox WHERE topic = 'media_unlinked'"
        " AND payload::text LIKE $1",
        f"%{group}%",
    )
    assert unlinked == [
        [
            {
                "message_id": str(old.id),
                "conversation_id": str(group),
                "sender_id": str(ann),
                "media_ids": [str(medium)],
            }
        ]
    ]
    assert node.woken == 1


async def test_long_histories_go_in_bounded_pieces(ages: Ages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENTRIES_AT_ONCE", 4)
    monkeypatch.setattr(module, "_LOOKED_AT_ONCE", 2)
    node, ann, bob = ages.node(), uuid4(), uuid4()
    groups = [await ages.group(ann, bob) for _ in range(5)]
    for group in groups:
        await keep(ages, group, 3600)
        for _ in range(10):
            await ages.send(group, ann)
    ages.clock.advance(3601)
    fresh = [await ages.send(group, bob) for group in groups]
    assert await node.retention.purge_outdated() == 50
    for group, head in zip(groups, fresh, strict=True):
        assert [payload["until_seq"] for payload in told(node, group)] == [4, 8, 10]
        assert (await left(ages, group))[0] == (head.seq, "new_message")


async def test_a_call_that_has_no_time_left_stops(ages: Ages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENTRIES_AT_ONCE", 2)
    node, ann, bob = ages.node(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    await keep(ages, group, 3600)
    for _ in range(6):
        await ages.send(group, ann)
    ages.clock.advance(3601)
    answers = iter([False, False, True, True])
    assert await node.retention.purge_outdated(until=lambda: next(answers)) == 2
    assert await node.retention.purge_outdated() == 4


async def test_many_nodes_purge_once(ages: Ages) -> None:
    ann, bob = uuid4(), uuid4()
    nodes = [ages.node() for _ in range(3)]
    groups = [await ages.group(ann, bob) for _ in range(5)]
    for group in groups:
        await keep(ages, group, 3600)
        for _ in range(3):
            await ages.send(group, ann)
    ages.clock.advance(3601)
    assert sum(await asyncio.gather(*(node.retention.purge_outdated() for node in nodes))) == 15
    for group in groups:
        assert [item for node in nodes for item in told(node, group)] == [{"seq": 4, "until_seq": 3}]


@pytest.mark.parametrize("step", ["hold", "outdated_stretch", "purge", "append_silently"])
async def test_a_crash_at_any_step_costs_nothing(
    ages: Ages, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    node, ann, bob = ages.node(), uuid4(), uuid4()
    group = await ages.group(ann, bob)
    await keep(ages, group, 3600)
    await ages.send(group, ann)
    ages.clock.advance(3601)

    async def crash(*_: Any, **__: Any) -> Any:
        raise Unavailable

    with monkeypatch.context() as patch:
        patch.setattr(store, step, crash)
        with pytest.raises(Unavailable):
            await node.retention.purge_outdated()
    assert node.doubts == 1
    assert await left(ages, group) == [(1, "new_message")]
    assert await node.retention.purge_outdated() == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gaps=st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    kept=st.integers(3600, 9000),
    piece=st.integers(2, 5),
)
async def test_the_log_stays_dense_from_its_floor_on(
    ages: Ages, gaps: list[int], kept: int, piece: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ENTRIES_AT_ONCE", piece)
        node, ann, bob = ages.node(), uuid4(), uuid4()
        group = await ages.group(ann, bob)
        await keep(ages, group, kept)
        sent = {}
        for gap in gaps:
            head = await ages.send(group, ann)
            sent[head.id] = ages.clock.now()
            ages.clock.advance(gap)
            await node.retention.purge_outdated()
            expected = [one for one, at in sent.items() if at >= ages.clock.now() - timedelta(seconds=kept)]
            assert [one for one in sent if await ages.head(one) is not None] == expected
            floor = await ages.fetchval("SELECT purged_seq FROM conversations WHERE id = $1", group)
            last = await ages.fetchval("SELECT last_seq FROM conversations WHERE id = $1", group)
            assert [seq for seq, _ in await left(ages, group)] == list(range(floor + 1, last + 1))


async def people(stack: Stack, count: int) -> list[Door]:
    return [Door(stack, one) for one in await asyncio.gather(*(stack.register() for _ in range(count)))]


async def test_who_may_set_how_long_a_conversation_is_kept(stack: Stack) -> None:
    ann, bob, cid = await people(stack, 3)
    group, direct = await ann.group(bob), await ann.direct(bob)
    assert_problem(
        await bob.patch(f"/conversations/{group}", {"retention_seconds": 7200}), 403, "not_allowed"
    )
    assert_problem(
        await cid.patch(f"/conversations/{group}", {"retention_seconds": 7200}), 404, "conversation_not_found"
    )
    assert (await ann.ok(f"/conversations/{group}"))["retention_seconds"] is None
    for door, conversation in ((ann, group), (bob, direct)):
        answer = await door.patch(f"/conversations/{conversation}", {"retention_seconds": 7200})
        assert (answer.status_code, answer.json()["retention_seconds"]) == (200, 7200)
        await door.patch(f"/conversations/{conversation}", {"retention_seconds": 7200})
        assert (await door.patch(f"/conversations/{conversation}", {"settings": {"a": 1}})).json()[
            "retention_seconds"
        ] == 7200
        (event,) = await door.log(conversation)
        assert (event["event"], event["payload"]["retention_seconds"]) == ("conversation_updated", 7200)
    answer = await ann.patch(f"/conversations/{group}", {"retention_seconds": None})
    assert answer.json()["retention_seconds"] is None
    assert (await ann.log(group))[-1]["payload"]["retention_seconds"] is None


@pytest.mark.parametrize("value", [0, -1, 3599, 2**31, "soon", 3600.5, [], {}, True])
async def test_nonsense_for_retention_is_refused(stack: Stack, value: object) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    assert_problem(
        await ann.patch(f"/conversations/{direct}", {"retention_seconds": value}), 422, "invalid_request"
    )


async def test_everybody_is_told_and_reads_on_behind_the_purge(stack: Stack, messaging_db: Database) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    await ann.patch(f"/conversations/{direct}", {"retention_seconds": 3600})
    old = await ann.send(direct, "old")
    # Not by the clock: it would end everybody's sessions.
    async with messaging_db.connection() as connection:
        for table, column in (("messages", "sent_at"), ("conversation_events", "created_at")):
            await connection.execute(
                f"UPDATE {table} SET {column} = {column} - interval '1 day' WHERE conversation_id = $1",
                UUID(direct),
            )
    young = await bob.send(direct, "young")
    line = await Line.open(stack.messaging, ann.person)
    topic = f"conversation:{direct}"
    await line.join(topic)
    retention = next(
        factory for name, factory in stack.messaging.running.service.loops.items() if name == "retention"
    )
    running = asyncio.ensure_future(retention())
    purged = await line.next(topic, "history_purged", timeout=15)
    running.cancel()
    assert purged == {"seq": 4, "until_seq": 2}
    assert [item["id"] for item in (await bob.ok(f"/conversations/{direct}/messages"))["items"]] == [
        young["id"]
    ]
    assert [event["seq"] for event in await bob.log(direct)] == [3, 4]
    assert_problem(await bob.get(f"/messages/{old['id']}/status"), 404, "message_not_found")
    assert (await bob.ok(f"/conversations/{direct}"))["unread_count"] == 0
    await line.close()
