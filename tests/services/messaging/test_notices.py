"""What people are told of conversations outside them: on their own channel, and by notification when they are away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.services.messaging.door import Door, assert_problem
from tests.services.messaging.line import Line
from tests.stack import Node, Stack

from whispr.contracts import notification_pb2, notification_pb2_grpc
from whispr.kit.grpc import create_server, listen
from whispr.kit.mtls import WorkloadIdentity
from whispr.services.messaging.service import conversations, members


@pytest.fixture
async def doors(stack: Stack) -> list[Door]:
    return [Door(stack, person) for person in await asyncio.gather(*(stack.register() for _ in range(3)))]


async def own_line(node: Node, door: Door) -> Line:
    line = await Line.open(node, door.person)
    await line.join(f"user:{door.id}")
    return line


async def test_members_are_told_of_a_new_conversation_on_every_node(stack: Stack, doors: list[Door]) -> None:
    ann, bob, cid = doors
    other_node = await stack.another_node()
    lines = [await own_line(node, door) for node, door in ((stack.messaging, ann), (other_node, bob))]
    group = await ann.group(bob, cid, metadata={"name": "g"})
    for line, door in zip(lines, (ann, bob), strict=True):
        told = (await line.next(f"user:{door.id}", "conversation_added"))["conversation"]
        assert (told["id"], told["type"], told["metadata"], told["member_count"]) == (
            group,
            "group",
            {"name": "g"},
            3,
        )
        assert {(member["user_id"], member["role"]) for member in told["members"]} == {
            (ann.id, "owner"),
            (bob.id, "member"),
            (cid.id, "member"),
        }
        assert "read_seq" not in told["members"][0]
        await line.close()
    await other_node.running.stop()


async def test_only_the_newcomer_is_told_of_joining_and_the_leaver_of_leaving(
    stack: Stack, doors: list[Door]
) -> None:
    ann, bob, cid = doors
    group = await ann.group(bob)
    at_bob, at_cid = await own_line(stack.messaging, bob), await own_line(stack.messaging, cid)
    await ann.post(f"/conversations/{group}/members", {"member_ids": [cid.id]})
    assert (await at_cid.next(f"user:{cid.id}", "conversation_added"))["conversation"]["id"] == group
    await ann.delete(f"/conversations/{group}/members/{cid.id}")
    assert await at_cid.next(f"user:{cid.id}", "conversation_removed") == {
        "conversation_id": group,
        "reason": "removed",
    }
    await bob.delete(f"/conversations/{group}")
    assert (await at_bob.next(f"user:{bob.id}", "conversation_removed"))["reason"] == "left"
    assert not at_bob.has(f"user:{bob.id}", "conversation_added")
    await at_bob.close()
    await at_cid.close()


async def test_every_change_reaches_the_open_channel_in_order(stack: Stack, doors: list[Door]) -> None:
    ann, bob, cid = doors
    group = await ann.group(bob)
    line = await Line.open(stack.messaging, bob.person)
    topic = f"conversation:{group}"
    await line.join(topic)
    await ann.patch(f"/conversations/{group}", {"metadata": {"x": 1}})
    await ann.post(f"/conversations/{group}/members", {"member_ids": [cid.id]})
    await ann.patch(f"/conversations/{group}/members/{cid.id}", {"role": "admin"})
    await ann.delete(f"/conversations/{group}/members/{cid.id}")
    await ann.delete(f"/conversations/{group}")
    assert await line.seqs(topic, 5) == [1, 2, 3, 4, 5]
    pushed = [(name, payload) for name, payload in line.inbox[topic] if "seq" in payload]
    assert pushed == [(event["event"], event["payload"]) for event in await bob.log(group)]
    await line.close()


async def test_a_limit_on_starting_conversations(
    stack: Stack, doors: list[Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "CREATIONS_PER_HOUR", 2)
    monkeypatch.setattr(members, "ADDITIONS_PER_HOUR", 2)
    node = await stack.another_node(rate_limits="on")
    ann = Door(stack, doors[0].person, node.url)
    group = await ann.group()
    await ann.group()
    refused = await ann.post("/conversations", {"type": "group", "member_ids": []})
    assert_problem(refused, 429, "rate_limited")
    assert int(refused.headers["Retry-After"]) > 1
    path = f"/conversations/{group}/members"
    for _ in range(2):
        assert (await ann.post(path, {"member_ids": [ann.id]})).status_code == 200
    assert_problem(await ann.post(path, {"member_ids": [ann.id]}), 429, "rate_limited")
    await node.running.stop()


class Received(notification_pb2_grpc.EventServiceServicer):
    """What notification was told."""

    def __init__(self) -> None:
        self.events: dict[str, notification_pb2.Event] = {}

    async def PublishEvents(  # noqa: N802
        self, request: notification_pb2.PublishEventsRequest, context: Any
    ) -> notification_pb2.PublishEventsResponse:
        self.events |= {event.event_id: event for event in request.events}
        return notification_pb2.PublishEventsResponse(accepted=len(request.events))


@pytest.fixture
async def notification(stack: Stack) -> AsyncIterator[tuple[str, Received]]:
    """A server at notification's place: its address, and what it is told."""
    settings = stack.settings("notification")
    assert settings.identity_dir is not None
    identity = WorkloadIdentity(settings.identity_dir)
    server = create_server(settings, identity)
    received = Received()
    notification_pb2_grpc.add_EventServiceServicer_to_server(received, server)
    port = listen(server, "127.0.0.1:0", identity)
    await server.start()
    yield f"127.0.0.1:{port}", received
    await server.stop(None)


async def test_who_is_away_is_announced_to_notification(
    stack: Stack, doors: list[Door], notification: tuple[str, Received]
) -> None:
    address, received = notification
    ann, bob, cid = doors
    group = await ann.group(bob, cid)
    waiting = await ann.send(group, "sent while notification did not run")
    at_bob = await own_line(stack.messaging, bob)
    node = await stack.another_node(notification_address=address)
    at_node = Door(stack, ann.person, node.url)

    async def announced(message: dict[str, Any]) -> set[str]:
        # What earlier tests left in the outbox goes first.
        async with asyncio.timeout(60):
            while message["id"] not in received.events:
                await asyncio.sleep(0.02)
        return set(received.events[message["id"]].recipient_ids)

    assert cid.id in await announced(waiting)
    # The nodes tell each other who is present a few times a second.
    async with asyncio.timeout(10):
        while await announced(await at_node.send(group)) != {cid.id}:
            await asyncio.sleep(0.1)
    await at_bob.close()
    await node.running.stop()
