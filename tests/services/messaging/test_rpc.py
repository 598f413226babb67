"""The gRPC door of messaging over mutual TLS: who may call, and what erasing a person does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest
from tests.services.messaging.door import Door, assert_problem
from tests.stack import Stack

from whispr.contracts import kit_pb2, kit_pb2_grpc, messaging_pb2, messaging_pb2_grpc
from whispr.kit.db import Database
from whispr.kit.errors import Failure, Kind
from whispr.kit.grpc import Channel
from whispr.kit.mtls import WorkloadIdentity
from whispr.kit.settings import SERVICES
from whispr.services.messaging.client import MessagingClient

SOME_ID = "01a1fb8e-963b-71f9-ae9b-c029c90a02cf"


class Neighbours:
    """Channels to messaging, each with another service's certificate."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._channels: dict[str, Channel] = {}

    def __getitem__(self, service: str) -> Channel:
        if service not in self._channels:
            directory = self._stack.settings(service).identity_dir
            assert directory is not None
            self._channels[service] = Channel(
                self._stack.messaging.grpc, "messaging", WorkloadIdentity(directory)
            )
        return self._channels[service]

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()


@pytest.fixture(scope="module")
async def neighbours(stack: Stack) -> AsyncIterator[Neighbours]:
    made = Neighbours(stack)
    yield made
    await made.close()


async def people(stack: Stack, count: int) -> list[Door]:
    return [Door(stack, person) for person in await asyncio.gather(*(stack.register() for _ in range(count)))]


@pytest.mark.parametrize("service", [service for service in SERVICES if service != "auth"])
async def test_only_auth_erases(stack: Stack, neighbours: Neighbours, service: str) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    stub: Any = messaging_pb2_grpc.MessagingServiceStub(neighbours[service].grpc)
    request = messaging_pb2.EraseUserRequest(operation_id=str(uuid4()), user_id=ann.id)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stub.EraseUser(request, timeout=5)
    assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert (await ann.ok(f"/conversations/{direct}"))["is_active"] is True


@pytest.mark.parametrize(("user_id", "operation_id"), [("x", SOME_ID), (SOME_ID, ""), ("", "")])
async def test_malformed_calls_are_refused(neighbours: Neighbours, user_id: str, operation_id: str) -> None:
    channel = neighbours["auth"]
    stub = messaging_pb2_grpc.MessagingServiceStub(channel.grpc)
    request = messaging_pb2.EraseUserRequest(operation_id=operation_id, user_id=user_id)
    with pytest.raises(Failure) as failure:
        await channel.call(stub.EraseUser, request)
    assert (failure.value.kind, failure.value.code) == (Kind.INVALID, "invalid_request")


async def test_an_erased_person_leaves_everything(
    stack: Stack, neighbours: Neighbours, messaging_db: Database
) -> None:
    ann, bob, cid = await people(stack, 3)
    direct = await ann.direct(bob)
    owned = await ann.group(bob, cid)
    joined = await bob.group(ann)
    sent = await ann.send(owned, "mine")
    await bob.send(owned, "yours")
    await ann.post(f"/conversations/{owned}/read", {"seq": 2})
    await ann.patch(f"/conversations/{owned}", {"settings": {"secret": 1}})
    client = MessagingClient(neighbours["auth"])
    assert await client.erase_user(ann.person.user_id, uuid4()) == 3
    assert await client.erase_user(ann.person.user_id, uuid4()) == 0

    for conversation in (direct, owned, joined):
        assert_problem(await ann.get(f"/conversations/{conversation}"), 404, "conversation_not_found")
    log = await bob.log(owned)
    assert [event["event"] for event in log] == [
        "new_message",
        "new_message",
        "member_updated",
        "member_removed",
    ]
    assert log[0]["payload"] == sent
    assert log[3]["payload"]["reason"] == "account_deleted"
    assert [member["role"] for member in (await bob.ok(f"/conversations/{owned}"))["members"]].count(
        "owner"
    ) == 1
    assert [event["event"] for event in await bob.log(direct)] == ["member_removed", "conversation_updated"]
    assert_problem(await bob.post("/messages", bob.draft(direct)), 409, "conversation_closed")
    async with messaging_db.connection() as connection:
        for table in ("device_cursors", "receipt_marks"):
            left = await connection.fetchval(
                f"SELECT count(*) FROM {table} WHERE user_id = $1", ann.person.user_id
            )
            assert left == 0
        settings = await connection.fetch(
            "SELECT settings FROM conversation_members WHERE user_id = $1", ann.person.user_id
        )
        assert [row["settings"] for row in settings] == [{}] * 3


async def test_a_deleted_account_is_erased_here(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    group = await bob.group(ann)
    answer = await stack.http.request(
        "DELETE",
        f"{stack.auth.url}/api/v1/auth/account",
        json={"password": ann.person.password},
        headers=ann.person.headers,
    )
    assert answer.status_code == 204, answer.text
    async with asyncio.timeout(10):
        while (await bob.ok(f"/conversations/{group}"))["member_count"] != 1:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("method", "allowed"),
    [
        ("CleanupExpiredMessages", "scheduling"),
        ("AuthorizeMediaAccess", "media"),
        ("GenerateUsageReport", "scheduling"),
    ],
)
async def test_each_method_is_for_one_service_only(neighbours: Neighbours, method: str, allowed: str) -> None:
    codes = {}
    for service in SERVICES:
        stub: Any = messaging_pb2_grpc.MessagingServiceStub(neighbours[service].grpc)
        request = getattr(messaging_pb2, f"{method}Request")()
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await getattr(stub, method)(request, timeout=5)
        codes[service] = refusal.value.code()
    # The empty request is wrong, but only the right caller is told so.
    assert codes.pop(allowed) is grpc.StatusCode.INVALID_ARGUMENT
    assert set(codes.values()) == {grpc.StatusCode.PERMISSION_DENIED}


async def test_scheduling_has_expired_messages_cleaned_up(
    stack: Stack, neighbours: Neighbours, messaging_db: Database
) -> None:
    ann, bob = await people(stack, 2)
    direct, kept = await ann.direct(bob), await ann.group(bob)
    await ann.patch(f"/conversations/{kept}", {"retention_seconds": 3600})
    sent = (await ann.post("/messages", ann.draft(direct, expires_in=3600))).json()
    await ann.send(kept)
    async with messaging_db.connection() as connection:
        await connection.execute(
            "UPDATE messages SET expires_at = expires_at - interval '1 day' WHERE id = $1", UUID(sent["id"])
        )
        for table, column in (("messages", "sent_at"), ("conversation_events", "created_at")):
            await connection.execute(
                f"UPDATE {table} SET {column} = {column} - interval '1 day' WHERE conversation_id = $1",
                UUID(kept),
            )
    client = MessagingClient(neighbours["scheduling"])
    operation = uuid4()
    first = await client.cleanup_expired_messages(operation)
    # The service's own loop may have been faster with the one, and other tests' messages may have gone along.
    assert (first.expired >= 0, first.purged >= 2, first.more) == (True, True, False)
    assert (await bob.ok(f"/conversations/{direct}/messages"))["items"][0]["is_deleted"] is True
    assert [event["event"] for event in await bob.log(kept)] == ["history_purged"]
    await client.cleanup_expired_messages(operation)
    assert [event["event"] for event in await bob.log(kept)] == ["history_purged"]
    assert [event["event"] for event in await bob.log(direct)] == ["new_message", "message_deleted"]


async def test_media_asks_who_may_see_a_medium(stack: Stack, neighbours: Neighbours) -> None:
    ann, bob, cid = await people(stack, 3)
    group, medium = await ann.group(bob, cid), uuid4()
    body = ann.draft(group, message_type="media", media_ids=[str(medium)])
    sent = (await ann.post("/messages", body)).json()
    client = MessagingClient(neighbours["media"])

    async def may(door: Door) -> bool:
        return await client.authorize_media_access(door.person.user_id, medium, ann.person.user_id)

    assert [await may(door) for door in (ann, bob, cid)] == [True, True, True]
    await ann.delete(f"/conversations/{group}/members/{bob.id}")
    assert [await may(door) for door in (ann, bob, cid)] == [True, False, True]
    await ann.delete(f"/messages/{sent['id']}")
    assert [await may(door) for door in (ann, bob, cid)] == [False, False, False]


@pytest.mark.parametrize("missing", ["user_id", "media_id", "owner_id"])
async def test_a_question_about_nobody_is_refused(neighbours: Neighbours, missing: str) -> None:
    channel = neighbours["media"]
    stub = messaging_pb2_grpc.MessagingServiceStub(channel.grpc)
    fields = {"user_id": SOME_ID, "media_id": SOME_ID, "owner_id": SOME_ID, missing: "nobody"}
    with pytest.raises(Failure) as failure:
        await channel.call(stub.AuthorizeMediaAccess, messaging_pb2.AuthorizeMediaAccessRequest(**fields))
    assert (failure.value.kind, failure.value.fields["field"]) == (Kind.INVALID, missing)


async def test_scheduling_asks_for_maintenance(neighbours: Neighbours) -> None:
    channel = neighbours["scheduling"]
    stub = kit_pb2_grpc.MaintenanceServiceStub(channel.grpc)
    for task in ("analyze", "log_retention"):
        request = kit_pb2.RunMaintenanceRequest(operation_id=str(uuid4()), task=task)
        answer = await channel.call(stub.RunMaintenance, request, timeout=30)
        assert answer.task == task
