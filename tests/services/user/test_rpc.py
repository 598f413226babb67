"""The gRPC door of the user service over mutual TLS: who may call, and what the client makes of the answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import grpc
import pytest
from tests.stack import Person, Stack

from whispr.contracts import kit_pb2, kit_pb2_grpc, user_pb2, user_pb2_grpc
from whispr.kit.errors import Failure, Kind
from whispr.kit.grpc import Channel
from whispr.kit.mtls import WorkloadIdentity
from whispr.kit.policy import CALLS
from whispr.kit.settings import SERVICES
from whispr.services.user.client import Contactability, PresenceVisibility, Quota, StorageUsage, UserClient

METHODS = [method for method in CALLS if method.startswith("/user.UserService/")]


class Neighbours:
    """Channels to the user service, each with another service's certificate."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._channels: dict[str, Channel] = {}

    def __getitem__(self, service: str) -> Channel:
        if service not in self._channels:
            directory = self._stack.settings(service).identity_dir
            assert directory is not None
            self._channels[service] = Channel(self._stack.user.grpc, "user", WorkloadIdentity(directory))
        return self._channels[service]

    def client(self, service: str) -> UserClient:
        return UserClient(self[service])

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()


@pytest.fixture(scope="module")
async def neighbours(stack: Stack) -> AsyncIterator[Neighbours]:
    made = Neighbours(stack)
    yield made
    await made.close()


async def patch(stack: Stack, person: Person, **changes: object) -> None:
    answer = await stack.http.patch(f"{stack.user.url}/api/v1/users/me", json=changes, headers=person.headers)
    assert answer.status_code == 200, answer.text


async def put(stack: Stack, person: Person, kind: str, other: Person) -> None:
    url = f"{stack.user.url}/api/v1/users/me/{kind}/{other.user_id}"
    assert (await stack.http.put(url, headers=person.headers)).status_code == 204


def test_the_policy_knows_every_method() -> None:
    names = {method.name for method in user_pb2.DESCRIPTOR.services_by_name["UserService"].methods}
    assert {method.rpartition("/")[2] for method in METHODS} == names


@pytest.mark.parametrize("method", [*METHODS, "/kit.MaintenanceService/RunMaintenance"])
async def test_only_the_named_services_may_call(neighbours: Neighbours, method: str) -> None:
    for service in SERVICES:
        call = (
            neighbours[service]
            .current()
            .unary_unary(method, request_serializer=lambda _: b"", response_deserializer=lambda data: data)
        )
        try:
            await call(None, timeout=5)
            refused = False
        except grpc.aio.AioRpcError as error:
            refused = error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert refused == (service not in CALLS[method]), (service, method)


async def test_a_stranger_without_a_certificate_gets_no_connection(stack: Stack) -> None:
    async with grpc.aio.insecure_channel(stack.user.grpc) as channel:
        stub = user_pb2_grpc.UserServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.GetProfiles(user_pb2.GetProfilesRequest(), timeout=2)
        assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_profiles_carry_what_neighbours_need(stack: Stack, neighbours: Neighbours) -> None:
    ada, bob = await stack.register(), await stack.register()
    picture = uuid4()
    await patch(
        stack,
        ada,
        display_name="Zoë 王",
        avatar_media_id=str(picture),
        locale="fr",
        time_zone="Asia/Tokyo",
        privacy={"read_receipts": False, "profile": "nobody"},
    )
    client = neighbours.client("notification")
    found = {
        item.user_id: item
        for item in await client.get_profiles([ada.user_id, bob.user_id, uuid4(), ada.user_id])
    }
    assert set(found) == {ada.user_id, bob.user_id}
    profile = found[ada.user_id]
    assert (profile.display_name, profile.avatar_media_id, profile.username) == (
        "Zoë 王",
        picture,
        ada.username,
    )
    assert (profile.locale, profile.time_zone, profile.read_receipts) == ("fr", "Asia/Tokyo", False)
    assert (found[bob.user_id].display_name, found[bob.user_id].avatar_media_id) == (None, None)
    assert found[bob.user_id].read_receipts
    assert await client.get_profiles([]) == []


async def test_contactability_and_presence(stack: Stack, neighbours: Neighbours) -> None:
    ada, bob, eve, shy = [await stack.register() for _ in range(4)]
    await put(stack, bob, "blocks", eve)
    await patch(stack, shy, privacy={"messages": "contacts", "online": "contacts"})
    client = neighbours.client("messaging")
    stranger = uuid4()
    answers = await client.check_contactability(ada.user_id, [bob.user_id, shy.user_id, stranger], "message")
    assert answers == {
        bob.user_id: Contactability(bob.user_id, True, True, "ok"),
        shy.user_id: Contactability(shy.user_id, True, False, "contacts_only"),
        stranger: Contactability(stranger, False, False, "unknown"),
    }
    assert (await client.check_contactability(eve.user_id, [bob.user_id], "group"))[
        bob.user_id
    ].reason == "blocked"
    assert (await client.check_contactability(ada.user_id, [shy.user_id], "group"))[
        shy.user_id
    ].reason == "ok"
    assert not answers[bob.user_id].knows_sender
    await put(stack, bob, "contacts", ada)
    (known,) = (await client.check_contactability(ada.user_id, [bob.user_id], "group")).values()
    assert known == Contactability(bob.user_id, True, True, "ok", knows_sender=True)
    # It is the other one who says so, not the sender.
    (unknown,) = (await client.check_contactability(bob.user_id, [ada.user_id], "group")).values()
    assert not unknown.knows_sender
    await put(stack, ada, "contacts", shy)
    ask = client.presence_visibility
    assert await ask([(ada.user_id, ())]) == [[PresenceVisibility(shy.user_id, False, False)]]
    await put(stack, shy, "contacts", ada)
    assert await ask([(ada.user_id, ()), (eve.user_id, [bob.user_id])]) == [
        [PresenceVisibility(shy.user_id, True, True)],
        [PresenceVisibility(bob.user_id, False, False)],
    ]


async def test_contactability_of_pairs(stack: Stack, neighbours: Neighbours) -> None:
    ada, bob, eve = [await stack.register() for _ in range(3)]
    await put(stack, bob, "blocks", eve)
    await put(stack, bob, "contacts", ada)
    client = neighbours.client("messaging")
    stranger = uuid4()
    pairs = [
        (ada.user_id, bob.user_id),
        (eve.user_id, bob.user_id),
        (bob.user_id, eve.user_id),
        (ada.user_id, stranger),
        (eve.user_id, ada.user_id),
        (ada.user_id, bob.user_id),
    ]
    known = Contactability(bob.user_id, True, True, "ok", knows_sender=True)
    assert await client.check_pairs(pairs, "message") == [
        known,
        Contactability(bob.user_id, True, False, "blocked"),
        Contactability(eve.user_id, True, False, "blocked"),
        Contactability(stranger, False, False, "unknown"),
        Contactability(ada.user_id, True, True, "ok"),
        known,
    ]
    assert await client.check_pairs([], "message") == []
    assert len(await client.check_pairs(pairs * 200, "message")) == 1_200


async def test_more_ids_than_a_batch_holds_are_split(stack: Stack, neighbours: Neighbours) -> None:
    ada, bob = await stack.register(), await stack.register()
    many = [uuid4() for _ in range(1500)]
    answers = await neighbours.client("messaging").check_contactability(
        ada.user_id, [*many, bob.user_id], "group"
    )
    assert len(answers) == 1501
    assert answers[bob.user_id].allowed
    questions = [(ada.user_id, [*many, bob.user_id]), (bob.user_id, ()), (bob.user_id, [ada.user_id])]
    seen = await neighbours.client("messaging").presence_visibility(questions)
    assert [[item.user_id for item in answer] for answer in seen] == [[bob.user_id], [], [ada.user_id]]


async def test_storage_is_reserved_committed_and_freed(stack: Stack, neighbours: Neighbours) -> None:
    ada = await stack.register()
    client, upload, limit = neighbours.client("media"), uuid4(), 1024**3
    operation = uuid4()
    for _ in range(2):
        assert await client.update_storage_usage(
            operation, ada.user_id, "reserve", 700, upload
        ) == StorageUsage(limit, 0, 700)
    assert await client.update_storage_usage(uuid4(), ada.user_id, "commit", 650, upload) == StorageUsage(
        limit, 650, 0
    )
    assert (await client.get_user_quotas(ada.user_id))["storage_bytes"] == Quota(
        "storage_bytes", limit, 650, 0
    )
    assert set(await client.get_user_quotas(ada.user_id)) == {"storage_bytes", "contacts", "blocks"}
    with pytest.raises(Failure) as refusal:
        await client.update_storage_usage(uuid4(), ada.user_id, "reserve", limit)
    assert (refusal.value.kind, refusal.value.code) == (Kind.CONFLICT, "quota_exceeded")
    assert refusal.value.fields["available"] == limit - 650
    assert (await client.update_storage_usage(uuid4(), ada.user_id, "free", 650)).used == 0
    with pytest.raises(Failure) as refusal:
        await client.get_user_quotas(uuid4())
    assert refusal.value.code == "user_not_found"


async def test_erasure_is_final_and_may_be_repeated(stack: Stack, neighbours: Neighbours) -> None:
    ada, operation = await stack.register(), uuid4()
    await patch(stack, ada, display_name="Ada")
    for _ in range(2):
        await neighbours.client("auth").erase_user(ada.user_id, operation)
    assert await neighbours.client("messaging").get_profiles([ada.user_id]) == []
    answer = await stack.http.get(f"{stack.user.url}/api/v1/users/me", headers=ada.headers)
    assert (answer.status_code, answer.json()["code"]) == (404, "user_not_found")


async def test_reports_and_cleanup(stack: Stack, neighbours: Neighbours) -> None:
    await stack.register()
    client, now = neighbours.client("scheduling"), stack.clock.now()
    report = await client.generate_activity_report(uuid4(), now - timedelta(days=1), now + timedelta(days=1))
    assert report["threshold"] == 10
    assert set(report) == {
        "from",
        "until",
        "generated_at",
        "threshold",
        "profiles",
        "relations",
        "storage",
        "locales",
    }
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    for dry_run in (True, False):
        assert await client.cleanup_inactive_users(uuid4(), long_ago, dry_run=dry_run) == 0


@pytest.mark.parametrize("task", ["vacuum", "analyze", "reindex", "log_retention"])
async def test_maintenance_runs_on_request(neighbours: Neighbours, task: str) -> None:
    channel = neighbours["scheduling"]
    stub = kit_pb2_grpc.MaintenanceServiceStub(channel.grpc)
    request = kit_pb2.RunMaintenanceRequest(operation_id=str(uuid4()), task=task)
    answer = await channel.call(stub.RunMaintenance, request, timeout=20)
    assert answer.task == task
    assert answer.affected >= (6 if task in ("vacuum", "analyze") else 0)


ID = str(UUID(int=1))


@pytest.mark.parametrize(
    ("caller", "method", "request_message", "field"),
    [
        ("messaging", "GetProfiles", user_pb2.GetProfilesRequest(user_ids=["nobody"]), "user_ids"),
        (
            "messaging",
            "CheckContactability",
            user_pb2.CheckContactabilityRequest(purpose="message"),
            "sender_id",
        ),
        (
            "messaging",
            "CheckContactability",
            user_pb2.CheckContactabilityRequest(sender_id=ID, purpose="spam"),
            "purpose",
        ),
        (
            "messaging",
            "GetPresenceVisibility",
            user_pb2.GetPresenceVisibilityRequest(questions=[user_pb2.PresenceQuestion(viewer_id="1")]),
            "viewer_id",
        ),
        ("media", "GetUserQuotas", user_pb2.GetUserQuotasRequest(), "user_id"),
        (
            "media",
            "UpdateStorageUsage",
            user_pb2.UpdateStorageUsageRequest(user_id=ID, action="take"),
            "action",
        ),
        (
            "media",
            "UpdateStorageUsage",
            user_pb2.UpdateStorageUsageRequest(user_id=ID, action="free"),
            "operation_id",
        ),
        ("auth", "EraseUser", user_pb2.EraseUserRequest(user_id=ID), "operation_id"),
        (
            "scheduling",
            "CleanupInactiveUsers",
            user_pb2.CleanupInactiveUsersRequest(operation_id=ID),
            "inactive_since",
        ),
    ],
)
async def test_bad_requests_name_the_field(
    neighbours: Neighbours, caller: str, method: str, request_message: object, field: str
) -> None:
    channel = neighbours[caller]
    stub = user_pb2_grpc.UserServiceStub(channel.grpc)
    with pytest.raises(Failure) as refusal:
        await channel.call(getattr(stub, method), request_message)
    assert (refusal.value.kind, refusal.value.code) == (Kind.INVALID, "invalid_request")
    assert refusal.value.fields == {"field": field}


async def test_a_batch_over_the_limit_is_refused(neighbours: Neighbours) -> None:
    channel = neighbours["messaging"]
    stub = user_pb2_grpc.UserServiceStub(channel.grpc)
    request = user_pb2.GetProfilesRequest(user_ids=[str(uuid4()) for _ in range(1001)])
    with pytest.raises(Failure) as refusal:
        await channel.call(stub.GetProfiles, request)
    assert refusal.value.code == "batch_too_large"
