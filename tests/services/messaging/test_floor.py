"""What is purged is gone at every door, at once, and devices and nodes that were behind it read on."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID, uuid4

from tests.services.messaging.door import assert_problem
from tests.services.messaging.rooms import make_conversation
from tests.services.messaging.test_changes import Open, connect, edit, edit_of, messaging_tables
from tests.services.messaging.test_channels import conversation, new_door
from tests.services.messaging.test_fanout import BusNode, append, nodes, room, until
from tests.services.messaging.test_reactions_and_pins import pin, react
from tests.stack import Stack

from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.services.messaging.models import CommittedEvent
from whispr.services.messaging.service.history import History
from whispr.services.messaging.store import conversations

__all__ = ["connect", "messaging_tables", "nodes", "room"]


async def purge(db: Database, conversation_id: str, until_seq: int) -> None:
    """Move the floor before anything is deleted: the moment in which doors could leak."""
    async with db.transaction() as tx:
        await tx.execute(
            "UPDATE conversations SET purged_seq = $2 WHERE id = $1", UUID(conversation_id), until_seq
        )
        await conversations.append_event(
            tx, UUID(conversation_id), "history_purged", {"until_seq": until_seq}, ManualClock().now()
        )


async def test_the_purged_is_behind_every_door(
    stack: Stack, connect: Open, messaging_tables: Database
) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.group(ben)
    topic = conversation(topic_id)
    old = await ben.send(topic_id, "old")
    await pin(anna, old)
    line = await connect(anna.person)
    epoch = (await line.join(topic))["epoch"]
    young = await ben.send(topic_id, "young")
    edited = await edit(ben, old)
    await purge(messaging_tables, topic_id, 2)
    path = f"/messages/{old['id']}"
    for answer in (
        await anna.get(path),
        await anna.get(f"{path}/reactions"),
        await anna.get(f"{path}/status"),
        await react(anna, old, "👍"),
        await react(anna, old, "👍", "DELETE"),
        await pin(anna, old),
        await ben.patch(path, edit_of(ben, old, "again")),
        await ben.delete(path),
        await anna.delete(path),
    ):
        assert_problem(answer, 404, "message_not_found")
    assert (await anna.ok(f"/conversations/{topic_id}/pins"))["items"] == []
    shown = (await anna.ok(f"/conversations/{topic_id}/messages", after_seq=0))["items"]
    assert [message["id"] for message in shown] == [young["id"]]
    assert (await anna.ok(f"/conversations/{topic_id}/messages"))["items"] == shown
    view = await anna.ok(f"/conversations/{topic_id}")
    assert (view["unread_count"], view["last_message"]["id"]) == (1, young["id"])
    log = await anna.log(topic_id)
    assert [(event["seq"], event["event"]) for event in log] == [
        (3, "new_message"),
        (4, "message_deleted"),
        (5, "history_purged"),
    ]
    assert log[1]["payload"] == {"seq": 4, "message_id": old["id"], "deleted_by": None}
    assert (await line.push(topic, "sync", {"after_seq": 0}))["events"] == log
    again = await connect(anna.person)
    joined = await again.join(topic, {"cursor": {"epoch": epoch, "seq": 1}})
    assert (joined["events"], joined["recovered"]) == (log, True)
    own = await connect(anna.person)
    await own.join(f"user:{anna.id}")
    pushed = await own.next(f"user:{anna.id}", "undelivered")
    assert (pushed["events"], pushed["truncated"]) == (log, True)
    assert edited["content"] not in [event["payload"].get("content") for event in log]


async def test_what_was_deleted_of_the_last_message_shows_none(
    stack: Stack, messaging_tables: Database
) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    await ben.send(topic_id)
    await purge(messaging_tables, topic_id, 1)
    for item in (await anna.ok(f"/conversations/{topic_id}"), (await anna.ok("/conversations"))["items"][0]):
        assert (item["last_message"], item["unread_count"]) == (None, 0)


async def test_a_reply_to_what_is_purged_is_refused(stack: Stack, messaging_tables: Database) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    old = await ben.send(topic_id)
    await purge(messaging_tables, topic_id, 1)
    async with messaging_tables.connection() as connection:
        await connection.execute("DELETE FROM messages WHERE id = $1", old["id"])
    refused = await anna.post("/messages", anna.draft(topic_id, reply_to_id=old["id"]))
    assert_problem(refused, 422, "reply_not_found")


async def test_a_node_that_was_behind_a_purge_goes_on(
    nodes: tuple[BusNode, BusNode], messaging_db: Database, room: UUID
) -> None:
    one, _ = nodes
    await one.serve(room)
    one.bus.publish(await append(messaging_db, room, 2))
    assert one.seqs(room) == [1, 2]
    await append(messaging_db, room, 300)
    async with messaging_db.transaction() as tx:
        await tx.execute("DELETE FROM conversation_events WHERE conversation_id = $1 AND seq <= 290", room)
        await tx.execute("UPDATE conversations SET purged_seq = 290 WHERE id = $1", room)
    one.bus.suspect()
    await until(lambda: one.has_reached(room, 302))
    assert one.seqs(room) == [1, 2, *range(291, 303)]
    one.bus.publish(await append(messaging_db, room))
    assert one.has_reached(room, 303)


async def test_a_purge_while_a_device_is_being_told(messaging_db: Database) -> None:
    user_id = uuid4()
    room_id = await make_conversation(messaging_db, ManualClock(), [user_id])
    await append(messaging_db, room_id, 30)
    pages = History(messaging_db).undelivered(user_id, uuid4(), limit=5)
    first = await anext(pages)
    assert ([event.seq for event in first.items], first.truncated) == ([1, 2, 3, 4, 5], False)
    async with messaging_db.transaction() as tx:
        await tx.execute("UPDATE conversations SET purged_seq = 12 WHERE id = $1", room_id)
        # As if the rest of the purge came after the floor was read.
        await tx.execute("DELETE FROM conversation_events WHERE conversation_id = $1 AND seq <= 20", room_id)
    rest = [page async for page in pages]
    assert [event.seq for page in rest for event in page.items] == list(range(21, 31))
    assert all(page.truncated for page in rest)


async def test_changes_of_members_alone_drop_the_cached_members(
    nodes: tuple[BusNode, BusNode], room: UUID
) -> None:
    one, _ = nodes
    told: list[Any] = []
    one.bus.on_structure(told.append)
    for seq, event in enumerate(("new_message", "message_edited", "reaction_added", "message_pinned"), 1):
        one.bus.publish([CommittedEvent(room, seq, event, b"{}")])
    assert told == []
    for seq, event in enumerate(("member_added", "member_removed", "member_updated", "history_purged"), 5):
        one.bus.publish([CommittedEvent(room, seq, event, b"{}")])
    await asyncio.sleep(0)
    assert told == [room] * 4
