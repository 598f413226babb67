"""The gRPC door: every method answers its callers, refuses the others, and survives bad input."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import grpc
import pytest
from tests.services.auth.house import AuthHouse

from whispr.contracts import auth_pb2, kit_pb2, kit_pb2_grpc
from whispr.kit import policy
from whispr.kit.errors import Failure, Kind
from whispr.kit.settings import SERVICES
from whispr.services.auth.client import AuthClient

METHODS = [name.rsplit("/", 1)[1] for name in policy.CALLS if name.startswith("/auth.AuthService/")]


async def test_a_token_is_validated_at_the_source(house: AuthHouse) -> None:
    person = await house.register()
    async with house.as_service("media") as media:
        answer = await media.validate_token(person.token)
        assert answer.valid
        assert (answer.user_id, answer.device_id, answer.session_id) == (
            person.user_id, person.device_id, person.session_id,
        )  # fmt: skip
        assert answer.expires_at is not None
        assert 590 < (answer.expires_at - house.clock.now()).total_seconds() <= 600
        for token in ("", "x", person.token[:-2] + "AA", "a.b.c"):
            assert (await media.validate_token(token)).reason == "invalid_token"
        await house.call("POST", "/auth/logout", person)
        assert (await media.validate_token(person.token)).reason == "session_revoked"
        house.clock.advance(601)
        assert (await media.validate_token(person.token)).reason == "token_expired"


async def test_the_source_knows_of_a_session_ended_behind_its_back(house: AuthHouse, rows: Any) -> None:
    person = await house.register()
    await rows.execute("UPDATE sessions SET revoked_at = now() WHERE id = $1", person.session_id)
    async with house.as_service("messaging") as messaging:
        assert (await messaging.validate_token(person.token)).reason == "session_revoked"


@pytest.mark.parametrize("method", METHODS)
async def test_only_the_policys_callers_get_an_answer(house: AuthHouse, method: str) -> None:
    allowed = policy.CALLS[f"/auth.AuthService/{method}"]
    for service in SERVICES:
        if service in allowed:
            continue
        async with house.as_service(service) as client:
            request = getattr(auth_pb2, f"{method}Request")()
            with pytest.raises(Failure) as failure:
                await client._channel.call(
                    getattr(client._stub, method), request, timeout=2.0, idempotent=False
                )
            assert isinstance(failure.value.__cause__, grpc.aio.AioRpcError)
            assert failure.value.__cause__.code() is grpc.StatusCode.PERMISSION_DENIED


def call(client: AuthClient, method: str, **fields: Any) -> Any:
    request = getattr(auth_pb2, f"{method}Request")(**fields)
    return client._channel.call(getattr(client._stub, method), request, timeout=2.0, idempotent=False)


@pytest.mark.parametrize(
    ("service", "method", "fields"),
    [
        ("user", "GetUserInfo", {"user_ids": ["nonsense"]}),
        ("user", "GetUserInfo", {"user_ids": [str(uuid4())] * 1001}),
        ("messaging", "GetUserDevices", {"user_ids": [""]}),
        ("notification", "GetDeviceTokens", {"device_ids": ["x"]}),
        ("notification", "GetDeviceInfo", {"device_id": ""}),
        ("messaging", "ValidateDevice", {"user_id": str(uuid4()), "device_id": "x"}),
        ("notification", "ReportDeviceDelivery", {"operation_id": "x"}),
        (
            "notification",
            "ReportDeviceDelivery",
            {"operation_id": str(uuid4()), "deliveries": [{"device_id": str(uuid4()), "channel": "pigeon"}]},
        ),
        (
            "notification",
            "ReportDeviceDelivery",
            {
                "operation_id": str(uuid4()),
                "deliveries": [{"device_id": str(uuid4()), "channel": "fcm", "outcome": "ok"}],
            },
        ),
        ("scheduling", "CleanupExpiredSessions", {}),
        ("scheduling", "RotateKeys", {"operation_id": str(uuid4()), "kind": "house_keys"}),
        ("scheduling", "RotateKeys", {"kind": "token_keys"}),
        ("media", "GetRevocations", {"since": {"seconds": 2**60}}),
    ],
)
async def test_bad_input_is_said_to_be_invalid(
    house: AuthHouse, service: str, method: str, fields: dict[str, Any]
) -> None:
    async with house.as_service(service) as client:
        with pytest.raises(Failure) as failure:
            await call(client, method, **fields)
    assert failure.value.kind is Kind.INVALID
    assert failure.value.code == "invalid_request"


async def test_nothing_asked_is_nothing_answered(house: AuthHouse) -> None:
    async with house.as_service("user") as user:
        assert await user.get_user_info() == []
        assert await user.get_user_info(username="nobody_at_all") == []
        assert await user.get_user_info(username="\0") == []
    async with house.as_service("notification") as notification:
        assert await notification.get_device_tokens() == []
        assert await notification.report_device_delivery(uuid4(), []) == 0


async def test_maintenance_of_its_own_database(house: AuthHouse) -> None:
    async with house.as_service("scheduling") as scheduling:
        stub = kit_pb2_grpc.MaintenanceServiceStub(scheduling._channel.grpc)
        for task in ("vacuum", "analyze", "log_retention"):
            request = kit_pb2.RunMaintenanceRequest(operation_id=str(uuid4()), task=task)
            answer = await scheduling._channel.call(
                stub.RunMaintenance, request, timeout=20.0, idempotent=True
            )
            assert answer.task == task
