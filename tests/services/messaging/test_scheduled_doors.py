"""Scheduled messages through every door: REST, socket, gRPC, and on the way to scheduling."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest
from tests.services.messaging.door import Door, assert_problem, signature_of
from tests.services.messaging.line import Line, ReplyError
from tests.services.messaging.test_channels import conversation, message, new_door
from tests.stack import Node, Person, Stack, b64

from whispr.contracts import messaging_pb2, messaging_pb2_grpc, scheduling_pb2, scheduling_pb2_grpc
from whispr.kit.db import Database
from whispr.kit.errors import Failure, Kind
from whispr.kit.grpc import Channel, create_server, listen
from whispr.kit.mtls import WorkloadIdentity
from whispr.kit.settings import SERVICES
from whispr.services.messaging.api.scheduled import ScheduledAnswer, ScheduledView
from whispr.services.scheduling.client import SchedulingClient

Open = Callable[..., Awaitable[Line]]


@pytest.fixture
async def connect(stack: Stack) -> AsyncIterator[Open]:
    lines: list[Line] = []

    async def open_line(person: Person, node: Node | None = None) -> Line:
        line = await Line.open(node or stack.messaging, person)
        lines.append(line)
        return line

    yield open_line
    for line in lines:
        await line.close()


def at(stack: Stack, seconds: float) -> str:
    return (stack.clock.now() + timedelta(seconds=seconds)).isoformat()


async def schedule(door: Door, conversation_id: str, seconds: float = 30, **changes: Any) -> dict[str, Any]:
    """What a scheduled message is shown as."""
    draft = door.draft(conversation_id, send_at=at(door.stack, seconds), **changes)
    answer = await door.post("/messages", draft)
    assert answer.status_code == 202, answer.text
    ScheduledAnswer.model_validate(answer.json())
    return await shown(door, answer.json()["scheduled_id"])


async def shown(door: Door, scheduled_id: str) -> dict[str, Any]:
    found = await door.ok(f"/scheduled-messages/{scheduled_id}")
    ScheduledView.model_validate(found)
    return found


async def until(door: Door, scheduled_id: str, status: str) -> dict[str, Any]:
    async with asyncio.timeout(5):
        while (found := await shown(door, scheduled_id))["status"] != status:
            await asyncio.sleep(0.05)
    return found


_NOBODYS = "01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/scheduled-messages"),
        ("GET", f"/scheduled-messages/{_NOBODYS}"),
        ("PATCH", f"/scheduled-messages/{_NOBODYS}"),
        ("DELETE", f"/scheduled-messages/{_NOBODYS}"),
    ],
)
async def test_strangers_get_nothing(stack: Stack, method: str, path: str) -> None:
    answer = await stack.http.request(method, f"{stack.messaging.url}/api/v1{path}", json={})
    assert_problem(answer, 401, "unauthenticated")
    door = await new_door(stack)
    if path != "/scheduled-messages":
        assert_problem(await door.call(method, path, json={}), 404, "scheduled_not_found")


async def test_from_rest_to_every_device_at_its_time(stack: Stack, connect: Open) -> None:
    ann, ben = await new_door(stack), await new_door(stack)
    second = await stack.add_device(ann.person)
    chat = await ann.direct(ben)
    lines = [await connect(person) for person in (ann.person, second, ben.person)]
    for line in lines:
        await line.join(conversation(chat))
    plan = await schedule(ann, chat, 30, expires_in=600)
    assert (plan["status"], plan["message_id"], plan["needs"], plan["failure"]) == (
        "pending",
        None,
        None,
        None,
    )
    stack.clock.advance(31)
    pushed = [await line.next(conversation(chat), "new_message") for line in lines]
    assert pushed[0] == pushed[1] == pushed[2]
    assert (pushed[0]["client_id"], pushed[0]["content"]) == (plan["client_id"], plan["content"])
    sent = await until(ann, plan["id"], "sent")
    assert (sent["message_id"], sent["content"], sent["signature"]) == (pushed[0]["id"], {}, "")
    assert_problem(
        await ann.patch(f"/scheduled-messages/{plan['id']}", {"expires_in": 5}), 409, "already_sent"
    )
    problem = assert_problem(await ann.delete(f"/scheduled-messages/{plan['id']}"), 409, "already_sent")
    assert problem["message_id"] == sent["message_id"]


async def test_from_the_socket(stack: Stack, connect: Open) -> None:
    ann, ben = await new_door(stack), await new_door(stack)
    chat = await ann.direct(ben)
    line = await connect(ann.person)
    topic = conversation(chat)
    await line.join(topic)
    draft = message(ann, chat, send_at=at(stack, 30))
    reply = await line.push(topic, "new_message", draft)
    assert set(reply) == {"scheduled_id", "send_at", "status"}
    assert reply == await line.push(topic, "new_message", draft)
    assert (await shown(ann, reply["scheduled_id"]))["client_id"] == draft["client_id"]
    refused = await line.refused(topic, "new_message", message(ann, chat, send_at=at(stack, -1)))
    assert refused["reason"] == "invalid_send_at"
    nonsenses: tuple[Any, ...] = ("2026-11-21T04:00:00", "soon", 5, {}, "0001-01-01T00:00:00+14:00")
    for nonsense in nonsenses:
        refused = await line.refused(topic, "new_message", message(ann, chat, send_at=nonsense))
        assert refused["reason"] in ("invalid_request", "invalid_payload", "invalid_send_at"), refused
    stack.clock.advance(31)
    assert (await line.next(topic, "new_message"))["client_id"] == draft["client_id"]
    # The same over REST is the same request.
    again = await ann.post("/messages", {**draft, "conversation_id": chat})
    assert (again.status_code, again.json()["scheduled_id"]) == (202, reply["scheduled_id"])


async def test_a_list_of_one_s_own(stack: Stack) -> None:
    ann, ben = await new_door(stack), await new_door(stack)
    chat = await ann.direct(ben)
    made = [await schedule(ann, chat, seconds) for seconds in (300, 100, 200)]
    await schedule(ben, chat, 150)
    page = await ann.ok("/scheduled-messages", limit=2)
    assert [item["id"] for item in page["items"]] == [made[1]["id"], made[2]["id"]]
    rest = await ann.ok("/scheduled-messages", limit=2, cursor=page["next_cursor"])
    assert ([item["id"] for item in rest["items"]], rest["next_cursor"]) == ([made[0]["id"]], None)
    assert rest["items"] == [made[0]]
    assert (await ann.delete(f"/scheduled-messages/{made[0]['id']}")).status_code == 204
    assert (await ann.delete(f"/scheduled-messages/{made[0]['id']}")).status_code == 204
    cancelled = await ann.ok("/scheduled-messages", status="cancelled")
    assert [item["id"] for item in cancelled["items"]] == [made[0]["id"]]
    assert (await ann.ok("/scheduled-messages", status="sent"))["items"] == []
    assert_problem(await ann.get("/scheduled-messages", status="gone"), 422, "invalid_request")
    assert_problem(await ann.get("/scheduled-messages", cursor="x"), 422, "invalid_cursor")


async def test_refusals(stack: Stack) -> None:
    ann, ben, cid = [await new_door(stack) for _ in range(3)]
    chat = await ann.direct(ben)
    draft = ann.draft(chat)
    later = at(stack, 60)
    for change, status, code in (
        ({"send_at": at(stack, -5)}, 422, "invalid_send_at"),
        ({"send_at": at(stack, 400 * 86400)}, 422, "invalid_send_at"),
        ({"send_at": "9999-12-31T23:59:59-12:00"}, 422, "invalid_send_at"),
        ({"send_at": "0001-01-01T00:00:00+12:00"}, 422, "invalid_send_at"),
        ({"send_at": "2026-11-21T04:00:00"}, 422, "invalid_request"),
        ({"send_at": later, "signature": b64(bytes(64))}, 422, "bad_signature"),
        ({"send_at": later, "reply_to_id": str(uuid4())}, 422, "reply_not_found"),
        ({"send_at": later, "conversation_id": str(uuid4())}, 404, "conversation_not_found"),
    ):
        assert_problem(await ann.post("/messages", {**draft, **change}), status, code)
    assert_problem(await cid.post("/messages", cid.draft(chat, send_at=later)), 404, "conversation_not_found")
    plan = await schedule(ann, chat)
    path = f"/scheduled-messages/{plan['id']}"
    for method in ("GET", "PATCH", "DELETE"):
        assert_problem(await ben.call(method, path, json={"send_at": later}), 404, "scheduled_not_found")
    bodies: tuple[tuple[dict[str, Any], int, str], ...] = (
        ({"send_at": at(stack, -5)}, 422, "invalid_send_at"),
        ({"content": {"ciphertext": "eA=="}}, 422, "invalid_content"),
        ({"content": {"ciphertext": "eA=="}, "signature": "?"}, 422, "bad_signature"),
        ({"content": {"ciphertext": "eA=="}, "signature": plan["signature"]}, 422, "bad_signature"),
        ({"reply_to_id": str(uuid4())}, 422, "reply_not_found"),
        ({"expires_in": 0}, 422, "invalid_request"),
        ({"send_at": "soon"}, 422, "invalid_request"),
    )
    for change, status, code in bodies:
        assert_problem(await ann.patch(path, change), status, code)
    assert await shown(ann, plan["id"]) == plan


async def test_a_change_over_rest(stack: Stack) -> None:
    ann, ben = await new_door(stack), await new_door(stack)
    chat = await ann.direct(ben)
    first = await ann.send(chat)
    plan = await schedule(ann, chat, 30, expires_in=60, expires_from="read")
    path = f"/scheduled-messages/{plan['id']}"
    content = {"ciphertext": b64(b"better")}
    body = {
        "content": content,
        "signature": signature_of(ann.person, chat, plan["client_id"], content),
        "send_at": at(stack, 40),
        "reply_to_id": first["id"],
        "expires_in": None,
    }
    answer = await ann.patch(path, body)
    assert answer.status_code == 200, answer.text
    changed = answer.json()
    ScheduledView.model_validate(changed)
    assert (changed["content"], changed["reply_to_id"], changed["expires_in"]) == (content, first["id"], None)
    assert "expires_from" not in changed
    assert (await ann.patch(path, body)).json() == changed
    assert (await ann.patch(path, {})).json() == changed
    stack.clock.advance(41)
    sent = await until(ann, plan["id"], "sent")
    messages = (await ben.ok(f"/conversations/{chat}/messages"))["items"]
    assert [(one["id"], one["content"], one["reply_to_id"]) for one in messages[1:]] == [
        (sent["message_id"], content, first["id"])
    ]


async def test_a_device_change_in_between(stack: Stack, connect: Open) -> None:
    ann, ben = await new_door(stack), await new_door(stack)
    chat = await ann.direct(ben)
    line = await connect(ann.person)
    await line.join(f"user:{ann.id}")

    def content(*devices: Person) -> dict[str, Any]:
        return {"envelopes": {str(one.device_id): {"type": "message", "body": b64(b"x")} for one in devices}}

    plan = await schedule(ann, chat, 30, content=content(ben.person))
    newcomer = await stack.add_device(ben.person)
    stack.clock.advance(31)
    notice = await line.next(f"user:{ann.id}", "needs_reencrypt")
    assert notice == {
        "scheduled_id": plan["id"],
        "conversation_id": chat,
        "failure": "devices_mismatch",
        "missing": [str(newcomer.device_id)],
        "extra": [],
        "stale": [],
        "owners": {str(newcomer.device_id): ben.id},
    }
    waiting = await until(ann, plan["id"], "needs_reencrypt")
    assert waiting["needs"]["missing"] == [str(newcomer.device_id)]
    # Told again to a device that connects, a new one of the author's, too: it can do it in the first one's place.
    second = await stack.add_device(ann.person)
    another = await connect(second)
    await another.join(f"user:{ann.id}")
    assert await another.next(f"user:{ann.id}", "needs_reencrypt") == notice
    fresh = content(ann.person, ben.person, newcomer)
    at_second = Door(stack, second)
    answer = await at_second.patch(
        f"/scheduled-messages/{plan['id']}",
        {"content": fresh, "signature": signature_of(second, chat, plan["client_id"], fresh)},
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["sender_device_id"] == str(second.device_id)
    await until(ann, plan["id"], "sent")
    (received,) = (await Door(stack, newcomer).ok(f"/conversations/{chat}/messages"))["items"]
    assert received["sender_device_id"] == str(second.device_id)
    assert set(received["content"]["envelopes"]) == {str(newcomer.device_id)}
    third = await connect(ann.person)
    await third.join(f"user:{ann.id}")
    await third.settled()
    assert not third.has(f"user:{ann.id}", "needs_reencrypt")


async def test_one_that_fails_is_told_of(stack: Stack, connect: Open) -> None:
    ann, ben = await new_door(stack), await new_door(stack)
    chat = await ann.direct(ben)
    line = await connect(ann.person)
    await line.join(f"user:{ann.id}")
    plan = await schedule(ann, chat)
    blocked = await ben.stack.http.put(
        f"{stack.user.url}/api/v1/users/me/blocks/{ann.id}", headers=ben.person.headers
    )
    assert blocked.status_code in (200, 201, 204), blocked.text
    stack.clock.advance(31)
    notice = await line.next(f"user:{ann.id}", "scheduled_failed")
    assert notice == {"scheduled_id": plan["id"], "conversation_id": chat, "failure": "blocked"}
    failed = await until(ann, plan["id"], "failed")
    assert (failed["failure"], failed["content"]) == ("blocked", plan["content"])
    assert_problem(
        await ann.patch(f"/scheduled-messages/{plan['id']}", {"expires_in": 9}), 409, "not_pending"
    )
    assert (await ann.delete(f"/scheduled-messages/{plan['id']}")).status_code == 204


async def test_who_leaves_or_is_taken_out_sends_nothing_any_more(stack: Stack) -> None:
    ann, ben, cid = [await new_door(stack) for _ in range(3)]
    group = await ann.group(ben, cid)
    plans = [await schedule(door, group) for door in (ann, ben, cid)]
    assert (await ben.delete(f"/conversations/{group}/members/{ben.id}")).status_code == 204
    assert (await ann.delete(f"/conversations/{group}/members/{cid.id}")).status_code == 204
    for door, plan in ((ben, plans[1]), (cid, plans[2])):
        gone = await shown(door, plan["id"])
        assert (gone["status"], gone["failure"], gone["content"]) == ("cancelled", "forbidden", {})
    stack.clock.advance(31)
    await until(ann, plans[0]["id"], "sent")
    log = await ann.log(group)
    assert [event["payload"].get("client_id") for event in log if event["event"] == "new_message"] == [
        plans[0]["client_id"]
    ]


async def test_a_deleted_account_sends_nothing_any_more(stack: Stack, messaging_db: Database) -> None:
    ann, ben = await new_door(stack), await new_door(stack)
    group = await ben.group(ann)
    await schedule(ann, group)
    answer = await stack.http.request(
        "DELETE",
        f"{stack.auth.url}/api/v1/auth/account",
        json={"password": ann.person.password},
        headers=ann.person.headers,
    )
    assert answer.status_code == 204, answer.text

    async def left() -> int:
        async with messaging_db.connection() as connection:
            return int(
                await connection.fetchval(
                    "SELECT count(*) FROM scheduled_messages WHERE sender_id = $1", ann.person.user_id
                )
            )

    async with asyncio.timeout(10):
        while await left():
            await asyncio.sleep(0.05)


class Neighbours:
    """Channels to messaging with other services' certificates."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.opened: list[Channel] = []

    def __getitem__(self, service: str) -> Channel:
        directory = self._stack.settings(service).identity_dir
        assert directory is not None
        self.opened.append(Channel(self._stack.messaging.grpc, "messaging", WorkloadIdentity(directory)))
        return self.opened[-1]


@pytest.fixture
async def neighbours(stack: Stack) -> AsyncIterator[Neighbours]:
    made = Neighbours(stack)
    yield made
    for channel in made.opened:
        await channel.close()


async def fire(channel: Channel, scheduled_id: str) -> messaging_pb2.SendScheduledMessageResponse:
    stub = messaging_pb2_grpc.MessagingServiceStub(channel.grpc)
    request = messaging_pb2.SendScheduledMessageRequest(operation_id=str(uuid4()), scheduled_id=scheduled_id)
    answer: messaging_pb2.SendScheduledMessageResponse = await channel.call(
        stub.SendScheduledMessage, request, timeout=10, idempotent=True
    )
    return answer


@pytest.mark.parametrize("service", [service for service in SERVICES if service != "scheduling"])
async def test_only_scheduling_fires(stack: Stack, neighbours: Neighbours, service: str) -> None:
    stub: Any = messaging_pb2_grpc.MessagingServiceStub(neighbours[service].grpc)
    request = messaging_pb2.SendScheduledMessageRequest(operation_id=str(uuid4()), scheduled_id=str(uuid4()))
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stub.SendScheduledMessage(request, timeout=5)
    assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_scheduling_is_answered_the_same_however_often(stack: Stack, neighbours: Neighbours) -> None:
    ann, ben = await new_door(stack), await new_door(stack)
    chat = await ann.direct(ben)
    plan = await schedule(ann, chat, 30)
    channel = neighbours["scheduling"]
    early = await fire(channel, plan["id"])
    assert (early.status, early.message_id) == ("pending", "")
    assert early.send_at.ToDatetime(UTC) == datetime.fromisoformat(plan["send_at"])
    stack.clock.advance(31)
    answers = await asyncio.gather(*(fire(channel, plan["id"]) for _ in range(3)))
    assert {answer.status for answer in answers} == {"sent"}
    assert {answer.message_id for answer in answers} == {(await shown(ann, plan["id"]))["message_id"]}
    assert len((await ben.ok(f"/conversations/{chat}/messages"))["items"]) == 1


@pytest.mark.parametrize(
    ("operation_id", "scheduled_id", "kind", "code"),
    [
        ("", _NOBODYS, Kind.INVALID, "invalid_request"),
        (_NOBODYS, "x", Kind.INVALID, "invalid_request"),
        (_NOBODYS, _NOBODYS, Kind.NOT_FOUND, "scheduled_not_found"),
    ],
)
async def test_malformed_calls_are_refused(
    neighbours: Neighbours, operation_id: str, scheduled_id: str, kind: Kind, code: str
) -> None:
    channel = neighbours["scheduling"]
    stub = messaging_pb2_grpc.MessagingServiceStub(channel.grpc)
    request = messaging_pb2.SendScheduledMessageRequest(operation_id=operation_id, scheduled_id=scheduled_id)
    with pytest.raises(Failure) as failure:
        await channel.call(stub.SendScheduledMessage, request)
    assert (failure.value.kind, failure.value.code) == (kind, code)


class Planner(scheduling_pb2_grpc.SchedulingServiceServicer):
    """Scheduling, as far as messaging needs it."""

    def __init__(self) -> None:
        self.jobs: dict[str, scheduling_pb2.Job] = {}

    async def ScheduleJob(  # noqa: N802
        self, request: scheduling_pb2.ScheduleJobRequest, context: Any
    ) -> scheduling_pb2.Job:
        UUID(request.operation_id)
        job = scheduling_pb2.Job(
            id=str(uuid4()),
            key=request.key,
            revision=request.revision,
            type=request.type,
            status="scheduled",
            run_at=request.run_at,
            last_error=request.payload,
        )
        if request.key not in self.jobs or self.jobs[request.key].revision < request.revision:
            self.jobs[request.key] = job
        return self.jobs[request.key]

    async def CancelJob(  # noqa: N802
        self, request: scheduling_pb2.CancelJobRequest, context: Any
    ) -> scheduling_pb2.Job:
        UUID(request.operation_id)
        job = scheduling_pb2.Job(
            id=str(uuid4()), key=request.key, revision=request.revision, status="cancelled"
        )
        self.jobs[request.key] = job
        return job

    async def GetJob(  # noqa: N802
        self, request: scheduling_pb2.GetJobRequest, context: Any
    ) -> scheduling_pb2.Job:
        return self.jobs[request.key]

    async def has(self, key: str, revision: int) -> scheduling_pb2.Job:
        async with asyncio.timeout(10):
            while key not in self.jobs or self.jobs[key].revision < revision:
                await asyncio.sleep(0.02)
        return self.jobs[key]


@asynccontextmanager
async def scheduling(stack: Stack) -> AsyncIterator[tuple[Planner, str]]:
    settings = stack.settings("scheduling")
    assert settings.identity_dir is not None
    identity = WorkloadIdentity(Path(settings.identity_dir))
    server = create_server(settings, identity)
    planner = Planner()
    scheduling_pb2_grpc.add_SchedulingServiceServicer_to_server(planner, server)
    port = listen(server, "127.0.0.1:0", identity)
    await server.start()
    yield planner, f"127.0.0.1:{port}"
    await server.stop(None)


async def test_scheduling_is_told_once_it_runs(stack: Stack) -> None:
    ann, ben = await new_door(stack), await new_door(stack)
    chat = await ann.direct(ben)
    before = await schedule(ann, chat, 3000)
    async with scheduling(stack) as (planner, address):
        node = await stack.another_node(scheduling_address=address)
        door = Door(stack, ann.person, node.url)
        job = await planner.has(before["id"], 1)
        assert (job.type, job.run_at.ToDatetime(UTC)) == (
            "scheduled_message",
            datetime.fromisoformat(before["send_at"]),
        )
        assert job.last_error == f'{{"scheduled_id":"{before["id"]}"}}'
        await door.patch(f"/scheduled-messages/{before['id']}", {"send_at": at(stack, 4000)})
        moved = await planner.has(before["id"], 2)
        assert moved.run_at.ToDatetime(UTC) > job.run_at.ToDatetime(UTC)
        await door.delete(f"/scheduled-messages/{before['id']}")
        assert (await planner.has(before["id"], 3)).status == "cancelled"
        await node.running.stop()


async def test_the_client_of_scheduling(stack: Stack) -> None:
    async with scheduling(stack) as (_, address):
        directory = stack.settings("messaging").identity_dir
        assert directory is not None
        channel = Channel(address, "scheduling", WorkloadIdentity(directory))
        client = SchedulingClient(channel)
        run_at = datetime(2026, 12, 24, 18, 0, tzinfo=UTC)
        job = await client.schedule_job(uuid4(), "key", 1, "scheduled_message", run_at, {}, user_id=uuid4())
        assert (job.key, job.revision, job.status, job.run_at) == ("key", 1, "scheduled", run_at)
        assert await client.get_job("key") == job
        await client.cancel_job(uuid4(), "key", 2)
        assert (await client.get_job("key")).status == "cancelled"
        await channel.close()


async def test_a_switched_off_feature_is_refused_and_what_is_scheduled_goes_out(
    stack: Stack, connect: Open, tmp_path: Path
) -> None:
    live = tmp_path / "live.json"
    node = await stack.another_node(live_settings=live)
    ann, ben = await new_door(stack), await new_door(stack)
    chat = await ann.direct(ben)
    plan = await schedule(ann, chat, 30)
    live.write_text('{"messaging": {"scheduled_messages": false}}')
    node.running.context.live.reload()
    door = Door(stack, ann.person, node.url)
    refused = await door.post("/messages", door.draft(chat, send_at=at(stack, 30)))
    assert_problem(refused, 503, "feature_off")
    line = await connect(ann.person, node)
    await line.join(conversation(chat))
    with pytest.raises(ReplyError, match="feature_off"):
        await line.push(conversation(chat), "new_message", message(ann, chat, send_at=at(stack, 30)))
    stack.clock.advance(31)
    await until(ann, plan["id"], "sent")
    await node.running.stop()
