"""What the outbox tells notification: over real gRPC, to a server that answers as notification will."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.services.messaging.door import Door
from tests.stack import Stack

from whispr.contracts import notification_pb2, notification_pb2_grpc
from whispr.kit import outbox
from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.kit.grpc import Channel, create_server, listen
from whispr.kit.mtls import LocalCA, WorkloadIdentity
from whispr.kit.settings import CommonSettings
from whispr.services.messaging.app import Announcer
from whispr.services.messaging.service.announcing import MAX_RECIPIENTS, MESSAGE_SENT, Announcing
from whispr.services.messaging.service.structure import GROUP_EVENT
from whispr.services.notification.client import NotificationClient


class Received(notification_pb2_grpc.EventServiceServicer):
    """What notification was told."""

    def __init__(self) -> None:
        self.calls: list[list[notification_pb2.Event]] = []

    @property
    def events(self) -> list[notification_pb2.Event]:
        return [event for call in self.calls for event in call]

    async def PublishEvents(  # noqa: N802
        self, request: notification_pb2.PublishEventsRequest, context: Any
    ) -> notification_pb2.PublishEventsResponse:
        self.calls.append(list(request.events))
        return notification_pb2.PublishEventsResponse(accepted=len(request.events))


@dataclass
class People:
    """Who has a live device."""

    connected: set[UUID] = field(default_factory=set)

    async def online(self, user_ids: Collection[UUID]) -> Collection[UUID]:
        return self.connected & set(user_ids)


@dataclass
class Line:
    """Messaging's announcements on their way to notification."""

    received: Received
    announcing: Announcing
    people: People
    db: Database

    async def rows(self, topic: str, conversation_id: str) -> list[outbox.OutboxRow]:
        async with self.db.connection() as connection:
            records = await connection.fetch(
                "SELECT * FROM outbox WHERE topic = $1 AND payload::text LIKE $2 ORDER BY id",
                topic,
                f"%{conversation_id}%",
            )
        return [
            outbox.OutboxRow(r["id"], r["topic"], r["key"], r["payload"], r["created_at"], r["attempts"], {})
            for r in records
        ]


@pytest.fixture
async def line(messaging_db: Database, tmp_path: Path) -> AsyncIterator[Line]:
    """A server with notification's certificate and a client with messaging's."""
    ca = LocalCA(tmp_path / "ca")
    identities = {}
    for service in ("notification", "messaging"):
        ca.issue(service, tmp_path / service)
        identities[service] = WorkloadIdentity(tmp_path / service)
    settings = CommonSettings(environment="test", identity_dir=tmp_path / "notification")
    server = create_server(settings, identities["notification"])
    received = Received()
    notification_pb2_grpc.add_EventServiceServicer_to_server(received, server)
    port = listen(server, "127.0.0.1:0", identities["notification"])
    await server.start()
    channel = Channel(f"127.0.0.1:{port}", "notification", identities["messaging"])
    people = People()
    announcing = Announcing(messaging_db, Announcer(NotificationClient(channel)), people)
    yield Line(received, announcing, people, messaging_db)
    await channel.close()
    await server.stop(None)


async def people(stack: Stack, count: int) -> list[Door]:
    return [Door(stack, person) for person in await asyncio.gather(*(stack.register() for _ in range(count)))]


async def test_members_without_a_live_device_are_announced(stack: Stack, line: Line) -> None:
    ann, bob, cid, dan = await people(stack, 4)
    group = await ann.group(bob, cid, dan)
    sent = [await ann.send(group, "1"), await bob.send(group, "2")]
    await ann.delete(f"/conversations/{group}/members/{dan.id}")
    line.people.connected = {cid.person.user_id}
    rows = await line.rows(MESSAGE_SENT, group)
    await line.announcing.messages(rows)
    assert [
        (e.event_id, e.type, e.name, e.message_id, e.sender_id, set(e.recipient_ids), e.conversation_type)
        for e in line.received.events
    ] == [
        (sent[0]["id"], "message", "new_message", sent[0]["id"], ann.id, {bob.id}, "group"),
        (sent[1]["id"], "message", "new_message", sent[1]["id"], bob.id, {ann.id}, "group"),
    ]
    assert line.received.events[0].occurred_at.ToDatetime().isoformat() + "+00:00" == sent[0][
        "sent_at"
    ].replace("Z", "+00:00")
    await line.announcing.messages(rows)
    assert [event.event_id for event in line.received.events[2:]] == [message["id"] for message in sent]


async def test_nobody_is_told_of_what_was_before_their_time(stack: Stack, line: Line) -> None:
    ann, bob = await people(stack, 2)
    group = await ann.group()
    await ann.send(group, "alone")
    await ann.post(f"/conversations/{group}/members", {"member_ids": [bob.id]})
    await line.announcing.messages(await line.rows(MESSAGE_SENT, group))
    assert line.received.events == []


async def test_people_are_told_of_groups(stack: Stack, line: Line) -> None:
    ann, bob, cid = await people(stack, 3)
    group = await ann.group(bob)
    await ann.post(f"/conversations/{group}/members", {"member_ids": [cid.id]})
    await ann.delete(f"/conversations/{group}/members/{bob.id}")
    await cid.delete(f"/conversations/{group}/members/{cid.id}")
    rows = await line.rows(GROUP_EVENT, group)
    await line.announcing.groups(rows)
    await line.announcing.groups(rows)
    told = [(e.type, e.name, e.sender_id, list(e.recipient_ids), e.message_id) for e in line.received.events]
    assert told[:3] == [
        ("group", "conversation_added", ann.id, [bob.id], ""),
        ("group", "member_added", ann.id, [cid.id], ""),
        ("group", "member_removed", ann.id, [bob.id], ""),
    ]
    assert told[3:] == told[:3]
    ids = [event.event_id for event in line.received.events]
    assert ids[:3] == ids[3:]
    assert len(set(ids)) == 3


async def test_a_call_carries_a_bounded_number_of_recipients(
    line: Line, monkeypatch: pytest.MonkeyPatch, stack: Stack
) -> None:
    monkeypatch.setattr("whispr.services.messaging.service.announcing.MAX_RECIPIENTS", 3)
    assert MAX_RECIPIENTS > 3
    doors = await people(stack, 3)
    group = await doors[0].group(*doors[1:])
    for number in range(4):
        await doors[0].send(group, str(number))
    await line.announcing.messages(await line.rows(MESSAGE_SENT, group))
    assert [len(call) for call in line.received.calls] == [1, 1, 1, 1]


async def test_rows_wait_while_notification_does_not_run_and_go_after_their_time(
    new_database: Any, messaging_db: Database
) -> None:
    from whispr.kit import migrate

    url = new_database("messaging_outbox")
    migrate.upgrade("messaging", url)
    db = Database(url)
    await db.open()
    dispatcher = outbox.Dispatcher(db, ManualClock(), {}, ttl=timedelta(hours=24))
    async with db.transaction() as tx:
        await outbox.add(tx, MESSAGE_SENT, str(uuid4()), {"ranges": []})

    async def count() -> int:
        async with db.connection() as connection:
            return int(await connection.fetchval("SELECT count(*) FROM outbox"))

    running = asyncio.create_task(dispatcher.run())
    await asyncio.sleep(0.1)
    assert await count() == 1
    running.cancel()
    async with db.connection() as connection:
        await connection.execute("UPDATE outbox SET created_at = now() - interval '25 hours'")
    running = asyncio.create_task(dispatcher.run())
    async with asyncio.timeout(5):
        while await count():
            await asyncio.sleep(0.02)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await db.close()
