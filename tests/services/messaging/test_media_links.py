"""What media is told of messages, and whom messaging lets see a medium."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.services.messaging.ages import Ages
from tests.services.messaging.door import Door
from tests.stack import Stack

from whispr.contracts import media_pb2, media_pb2_grpc
from whispr.kit import outbox
from whispr.kit.db import Database
from whispr.kit.grpc import Channel, create_server, listen
from whispr.kit.mtls import LocalCA, WorkloadIdentity
from whispr.kit.settings import CommonSettings
from whispr.services.media.client import MediaClient
from whispr.services.messaging.app import LinkTeller
from whispr.services.messaging.models import Role
from whispr.services.messaging.service import media_links as module
from whispr.services.messaging.service.media_links import (
    MEDIA_LINKED,
    MEDIA_UNLINKED,
    MediaAccess,
    MediaLinks,
)
from whispr.services.messaging.store import changes, members


class Received(media_pb2_grpc.MediaServiceServicer):
    """What media was told."""

    def __init__(self) -> None:
        self.calls: list[media_pb2.LinkMediaRequest] = []

    async def LinkMedia(  # noqa: N802
        self, request: media_pb2.LinkMediaRequest, context: Any
    ) -> media_pb2.LinkMediaResponse:
        self.calls.append(request)
        return media_pb2.LinkMediaResponse(linked=len(request.links), unlinked=len(request.unlinks))


class Way:
    """From messaging's outbox to a server that answers as media will."""

    def __init__(self, received: Received, channel: Channel) -> None:
        self.received = received
        self.links = MediaLinks(LinkTeller(MediaClient(channel)))


@pytest.fixture
async def way(tmp_path: Path) -> AsyncIterator[Way]:
    ca = LocalCA(tmp_path / "ca")
    identities = {}
    for service in ("media", "messaging"):
        ca.issue(service, tmp_path / service)
        identities[service] = WorkloadIdentity(tmp_path / service)
    settings = CommonSettings(environment="test", identity_dir=tmp_path / "media")
    server = create_server(settings, identities["media"])
    received = Received()
    media_pb2_grpc.add_MediaServiceServicer_to_server(received, server)
    port = listen(server, "127.0.0.1:0", identities["media"])
    await server.start()
    channel = Channel(f"127.0.0.1:{port}", "media", identities["messaging"])
    yield Way(received, channel)
    await channel.close()
    await server.stop(None)


async def rows_of(db: Database, topic: str, conversation_id: UUID) -> list[outbox.OutboxRow]:
    async with db.connection() as connection:
        records = await connection.fetch(
            "SELECT * FROM outbox WHERE topic = $1 AND payload::text LIKE $2 ORDER BY id",
            topic,
            f"%{conversation_id}%",
        )
    return [
        outbox.OutboxRow(r["id"], r["topic"], r["key"], r["payload"], r["created_at"], 0, {}) for r in records
    ]


async def test_media_is_told_of_links_and_of_their_end(ages: Ages, way: Way) -> None:
    ann, bob, media = uuid4(), uuid4(), [uuid4(), uuid4()]
    group = await ages.group(ann, bob)
    head = await ages.send(group, ann, media_ids=media)
    await ages.send(group, ann)
    linked = await rows_of(ages.db, MEDIA_LINKED, group)
    await way.links.linked(linked)
    async with ages.db.transaction() as tx:
        await changes.tombstone(tx, group, [head.id])
    await way.links.unlinked(await rows_of(ages.db, MEDIA_UNLINKED, group))
    first, second = way.received.calls
    link = media_pb2.MediaLink(
        message_id=str(head.id),
        conversation_id=str(group),
        sender_id=str(ann),
        media_ids=sorted(map(str, media)),
    )
    (told,) = first.links
    assert sorted(told.media_ids) == list(link.media_ids)
    assert (told.message_id, told.conversation_id, told.sender_id) == (str(head.id), str(group), str(ann))
    assert list(second.unlinks) == [link]
    assert (len(first.unlinks), len(second.links)) == (0, 0)
    await way.links.linked(linked)
    assert way.received.calls[2] == first, "told again it is the same operation"


async def test_a_call_carries_a_bounded_number_of_media(
    ages: Ages, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_MEDIA", 3)
    ann = uuid4()
    group = await ages.group(ann, uuid4())
    for count in (2, 1, 1, 5, 1):
        await ages.send(group, ann, media_ids=[uuid4() for _ in range(count)])
    await way.links.linked(await rows_of(ages.db, MEDIA_LINKED, group))
    assert [[len(link.media_ids) for link in call.links] for call in way.received.calls] == [
        [2, 1],
        [1],
        [5],
        [1],
    ]
    assert len({call.operation_id for call in way.received.calls}) == 4


class World:
    """`ann` sent `medium` to `bob` in a group with `cid`, who came later."""

    def __init__(self, ages: Ages) -> None:
        self.ages = ages
        self.ann, self.bob, self.cid, self.dan, self.medium = (uuid4() for _ in range(5))
        self.access = MediaAccess(ages.db, ages.clock)

    async def make(self, **options: Any) -> World:
        self.group = await self.ages.group(self.ann, self.bob)
        self.head = await self.ages.send(self.group, self.ann, media_ids=[self.medium], **options)
        async with self.ages.db.transaction() as tx:
            await members.join(tx, self.group, [self.cid], Role.MEMBER, [1], self.ages.clock.now())
        return self

    async def may(self, user_id: UUID) -> bool:
        return await self.access.may_see(user_id, self.medium, self.ann)


async def test_members_who_see_the_message_see_its_medium(ages: Ages) -> None:
    world = await World(ages).make()
    assert [await world.may(one) for one in (world.ann, world.bob)] == [True, True]


async def test_nobody_else_does(ages: Ages) -> None:
    world = await World(ages).make()
    assert not await world.may(world.dan), "a stranger"
    assert not await world.may(world.cid), "who came after the message"
    assert not await world.access.may_see(world.bob, uuid4(), world.ann), "another medium"


async def test_only_the_owner_s_own_message_opens_a_medium(ages: Ages) -> None:
    world = await World(ages).make()
    # Dan has heard of the medium's id and sends it to himself and his friend.
    theirs = await ages.group(world.dan, world.cid)
    await ages.send(theirs, world.dan, media_ids=[world.medium])
    assert not await world.may(world.dan)
    assert not await world.may(world.cid)
    assert not await world.access.may_see(world.bob, world.medium, world.dan), "not the owner's conversation"


async def test_whoever_left_sees_it_no_more(ages: Ages) -> None:
    world = await World(ages).make()
    await ages.leave(world.group, world.bob)
    assert not await world.may(world.bob)
    assert await world.may(world.ann)


async def test_it_ends_with_the_message(ages: Ages) -> None:
    world = await World(ages).make()
    async with ages.db.transaction() as tx:
        await changes.tombstone(tx, world.group, [world.head.id])
    assert not await world.may(world.bob)


async def test_it_ends_with_the_message_s_time_also_before_it_is_erased(ages: Ages) -> None:
    world = await World(ages).make(expires_in=5)
    ages.clock.advance(4.9)
    assert await world.may(world.bob)
    ages.clock.advance(0.1)
    assert not await world.may(world.bob)


async def test_it_ends_with_the_purge(ages: Ages) -> None:
    world = await World(ages).make()
    node = ages.node()
    async with ages.db.connection() as connection:
        await connection.execute(
            "UPDATE conversations SET retention_seconds = 3600 WHERE id = $1", world.group
        )
    ages.clock.advance(3601)
    await node.retention.purge_outdated()
    assert not await world.may(world.bob)


async def test_another_message_of_the_owner_s_keeps_it_open(ages: Ages) -> None:
    world = await World(ages).make()
    again = await ages.direct(world.ann, world.bob)
    await ages.send(again, world.ann, media_ids=[world.medium])
    async with ages.db.transaction() as tx:
        await changes.tombstone(tx, world.group, [world.head.id])
    assert await world.may(world.bob)


async def test_a_real_message_s_rows_wait_for_media(stack: Stack, messaging_db: Database) -> None:
    ann, bob = (Door(stack, one) for one in await asyncio.gather(stack.register(), stack.register()))
    direct = await ann.direct(bob)
    medium = uuid4()
    body = ann.draft(direct, message_type="media", media_ids=[str(medium)])
    sent = (await ann.post("/messages", body)).json()
    assert (await ann.delete(f"/messages/{sent['id']}")).status_code in (200, 204)
    for topic in (MEDIA_LINKED, MEDIA_UNLINKED):
        (row,) = await rows_of(messaging_db, topic, UUID(direct))
        (link,) = row.payload["links"]
        assert (link["message_id"], link["sender_id"], link["media_ids"]) == (
            sent["id"],
            ann.id,
            [str(medium)],
        )
