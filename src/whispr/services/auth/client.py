"""How the other services call `auth`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

import msgspec

from whispr.contracts import auth_pb2, auth_pb2_grpc
from whispr.kit.grpc import Channel
from whispr.kit.identity import Revocation
from whispr.kit.ids import parse_id

BATCH = 1000

Outcome = Literal["ok", "invalid_token", "inactive"]


@dataclass(frozen=True, slots=True)
class TokenValidation:
    """What auth says of an access token; the ids are None unless it is valid."""

    valid: bool
    reason: str
    user_id: UUID | None = None
    device_id: UUID | None = None
    session_id: UUID | None = None
    roles: frozenset[str] = frozenset()
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class UserInfo:
    """An account. A deleted one has no name any more: `username` is empty."""

    user_id: UUID
    username: str
    status: str
    created_at: datetime
    roles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device; `last_seen_at` is to the day."""

    device_id: UUID
    user_id: UUID
    registration_id: int
    identity_key: bytes
    signing_key: bytes
    platform: str
    name: str
    created_at: datetime
    last_seen_at: datetime
    is_active: bool
    has_push_token: bool


@dataclass(frozen=True, slots=True)
class DeviceList:
    """The active devices of an account; `epoch` grows with every change of the list."""

    user_id: UUID
    epoch: int
    devices: tuple[DeviceInfo, ...]


@dataclass(frozen=True, slots=True)
class DeviceToken:
    """A push token in clear; for webpush `token` is the subscription as JSON."""

    user_id: UUID
    device_id: UUID
    platform: str
    channel: str
    token: str
    app_id: str
    environment: str
    updated_at: datetime
    epoch: int


@dataclass(frozen=True, slots=True)
class DeliveryReport:
    """What a push service said of a token; `token_updated_at` is the token's `updated_at`."""

    device_id: UUID
    channel: str
    outcome: Outcome
    at: datetime
    token_updated_at: datetime


class AuthClient:
    """`auth.AuthService`, and with `jwks` and `revocations` an `IdentitySource`.

    Every method raises the failure that `auth` raised, or `Unavailable`.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._stub = auth_pb2_grpc.AuthServiceStub(channel.grpc)

    async def jwks(self) -> dict[str, Any]:
        """The key set as at `/.well-known/jwks.json`."""
        request = auth_pb2.GetJwksRequest()
        answer = await self._channel.call(self._stub.GetJwks, request, timeout=2.0, idempotent=True)
        return msgspec.json.decode(answer.jwks, type=dict[str, Any])

    async def revocations(self, since: datetime) -> list[Revocation]:
        """Everything revoked at or after `since`."""
        request = auth_pb2.GetRevocationsRequest()
        request.since.FromDatetime(since)
        answer = await self._channel.call(self._stub.GetRevocations, request, timeout=2.0, idempotent=True)
        return [
            Revocation(subject=_subject(item.subject), id=parse_id(item.id), at=item.at.ToDatetime(UTC))
            for item in answer.revocations
        ]

    async def validate_token(self, token: str) -> TokenValidation:
        """The answer from the source, revocation included."""
        request = auth_pb2.ValidateTokenRequest(token=token)
        answer = await self._channel.call(self._stub.ValidateToken, request, timeout=2.0, idempotent=True)
        if not answer.valid:
            return TokenValidation(valid=False, reason=answer.reason)
        return TokenValidation(
            valid=True,
            reason="",
            user_id=parse_id(answer.user_id),
            device_id=parse_id(answer.device_id),
            session_id=parse_id(answer.session_id),
            roles=frozenset(answer.roles),
            expires_at=answer.expires_at.ToDatetime(UTC),
        )

    async def get_user_info(
        self, user_ids: Sequence[UUID] = (), username: str | None = None
    ) -> list[UserInfo]:
        """Accounts by id, any number of them, or the one with this exact name; unknown ones are left out."""
        found: list[UserInfo] = []
        for batch in _batches(user_ids) or [[]]:
            request = auth_pb2.GetUserInfoRequest(user_ids=batch, username=username or "")
            answer = await self._channel.call(self._stub.GetUserInfo, request, timeout=2.0, idempotent=True)
            found.extend(_user(item) for item in answer.users)
        return found

    async def get_user_devices(self, user_ids: Sequence[UUID]) -> dict[UUID, DeviceList]:
        """The active devices of any number of people; unknown and deleted ones are left out."""
        found: dict[UUID, DeviceList] = {}
        for batch in _batches(user_ids):
            request = auth_pb2.GetUserDevicesRequest(user_ids=batch)
            answer = await self._channel.call(
                self._stub.GetUserDevices, request, timeout=2.0, idempotent=True
            )
            for item in answer.lists:
                user_id = parse_id(item.user_id)
                devices = tuple(_device(device) for device in item.devices)
                found[user_id] = DeviceList(user_id, item.epoch, devices)
        return found

    async def get_device_tokens(
        self, user_ids: Sequence[UUID] = (), device_ids: Sequence[UUID] = ()
    ) -> list[DeviceToken]:
        """Working push tokens by account or by device, any number of them."""
        found: list[DeviceToken] = []
        requests = [auth_pb2.GetDeviceTokensRequest(user_ids=batch) for batch in _batches(user_ids)]
        requests += [auth_pb2.GetDeviceTokensRequest(device_ids=batch) for batch in _batches(device_ids)]
        for request in requests:
            answer = await self._channel.call(
                self._stub.GetDeviceTokens, request, timeout=2.0, idempotent=True
            )
            found.extend(_token(item) for item in answer.tokens)
        return found

    async def get_device_info(self, device_id: UUID) -> DeviceInfo:
        """A device, removed ones included. Raises NotFound with the code `device_not_found`."""
        request = auth_pb2.GetDeviceInfoRequest(device_id=str(device_id))
        answer = await self._channel.call(self._stub.GetDeviceInfo, request, timeout=2.0, idempotent=True)
        return _device(answer.device)

    async def validate_device(self, user_id: UUID, device_id: UUID) -> tuple[bool, str]:
        """Is this an active device of this account? If not, why: `unknown`, `revoked` or `foreign`."""
        request = auth_pb2.ValidateDeviceRequest(user_id=str(user_id), device_id=str(device_id))
        answer = await self._channel.call(self._stub.ValidateDevice, request, timeout=2.0, idempotent=True)
        return answer.valid, answer.reason

    async def report_device_delivery(self, operation_id: UUID, reports: Sequence[DeliveryReport]) -> int:
        """Pass on what push services said, at most 1,000 reports; how many tokens changed. May be repeated."""
        request = auth_pb2.ReportDeviceDeliveryRequest(operation_id=str(operation_id))
        for report in reports:
            item = request.deliveries.add(
                device_id=str(report.device_id), channel=report.channel, outcome=report.outcome
            )
            item.at.FromDatetime(report.at)
            item.token_updated_at.FromDatetime(report.token_updated_at)
        answer = await self._channel.call(
            self._stub.ReportDeviceDelivery, request, timeout=5.0, idempotent=True
        )
        return int(answer.applied)

    async def cleanup_expired_sessions(self, operation_id: UUID) -> tuple[int, int]:
        """Remove what has expired; how many sessions and revocations that were. May be repeated."""
        request = auth_pb2.CleanupExpiredSessionsRequest(operation_id=str(operation_id))
        answer = await self._channel.call(
            self._stub.CleanupExpiredSessions, request, timeout=30.0, idempotent=True
        )
        return int(answer.sessions_removed), int(answer.revocations_removed)

    async def rotate_keys(
        self, operation_id: UUID, kind: Literal["token_keys", "signing_keys"], *, force: bool = False
    ) -> tuple[bool, str]:
        """Make a new key if one is due, or now if `force`; whether one was made, and the newest's id. May be repeated."""
        request = auth_pb2.RotateKeysRequest(operation_id=str(operation_id), kind=kind, force=force)
        answer = await self._channel.call(self._stub.RotateKeys, request, timeout=10.0, idempotent=True)
        return bool(answer.rotated), str(answer.key_id)


def _batches(ids: Sequence[UUID]) -> list[list[str]]:
    texts = [str(item) for item in dict.fromkeys(ids)]
    return [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]


def _subject(text: str) -> Literal["session", "device", "user"]:
    match text:
        case "session" | "device" | "user":
            return text
        case _:
            raise ValueError(f"auth revoked an unknown kind of thing: {text}")


def _user(item: auth_pb2.UserInfo) -> UserInfo:
    return UserInfo(
        user_id=parse_id(item.user_id),
        username=item.username,
        status=item.status,
        created_at=item.created_at.ToDatetime(UTC),
        roles=tuple(item.roles),
    )


def _device(item: auth_pb2.Device) -> DeviceInfo:
    return DeviceInfo(
        device_id=parse_id(item.device_id),
        user_id=parse_id(item.user_id),
        registration_id=item.registration_id,
        identity_key=item.identity_key,
        signing_key=item.signing_key,
        platform=item.platform,
        name=item.name,
        created_at=item.created_at.ToDatetime(UTC),
        last_seen_at=item.last_seen_at.ToDatetime(UTC),
        is_active=item.is_active,
        has_push_token=item.has_push_token,
    )


def _token(item: auth_pb2.DeviceToken) -> DeviceToken:
    return DeviceToken(
        user_id=parse_id(item.user_id),
        device_id=parse_id(item.device_id),
        platform=item.platform,
        channel=item.channel,
        token=item.token,
        app_id=item.app_id,
        environment=item.environment,
        updated_at=item.updated_at.ToDatetime(UTC),
        epoch=item.epoch,
    )
