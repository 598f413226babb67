"""The gRPC door: `auth.AuthService`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, time
from typing import Any, get_args
from uuid import UUID

import grpc
import msgspec

from whispr.contracts import auth_pb2, auth_pb2_grpc
from whispr.kit.errors import Invalid, InvalidToken, SessionRevoked, TokenExpired
from whispr.kit.identity import Identity
from whispr.kit.rpc_fields import as_timestamp, read_choice, read_id, read_ids, read_time
from whispr.services.auth.models import (
    AccountInfo,
    DeliveryOutcome,
    DeliveryReport,
    Device,
    PushChannel,
    PushToken,
)
from whispr.services.auth.service import Auth
from whispr.services.auth.service.housekeeping import KeyKind

Call = grpc.aio.ServicerContext[Any, Any]

BATCH = 1000


class AuthServicer(auth_pb2_grpc.AuthServiceServicer):
    """Turns messages into calls of the rules and answers into messages."""

    def __init__(self, auth: Auth, identity: Identity) -> None:
        self._auth = auth
        self._identity = identity

    async def ValidateToken(
        self, request: auth_pb2.ValidateTokenRequest, context: Call
    ) -> auth_pb2.ValidateTokenResponse:
        try:
            caller = await self._identity.verify_async(request.token)
        except (InvalidToken, TokenExpired, SessionRevoked) as failure:
            return auth_pb2.ValidateTokenResponse(valid=False, reason=failure.code)
        if not await self._auth.sessions.is_live(caller.session_id):
            return auth_pb2.ValidateTokenResponse(valid=False, reason=SessionRevoked.code)
        return auth_pb2.ValidateTokenResponse(
            valid=True,
            user_id=str(caller.user_id),
            device_id=str(caller.device_id),
            session_id=str(caller.session_id),
            roles=sorted(caller.roles),
            expires_at=as_timestamp(datetime.fromtimestamp(caller.expires_at, UTC)),
        )

    async def GetUserInfo(
        self, request: auth_pb2.GetUserInfoRequest, context: Call
    ) -> auth_pb2.GetUserInfoResponse:
        user_ids = _ids("user_ids", request.user_ids)
        found = await self._auth.accounts.info(user_ids, request.username or None)
        return auth_pb2.GetUserInfoResponse(users=[_user(account) for account in found])

    async def GetUserDevices(
        self, request: auth_pb2.GetUserDevicesRequest, context: Call
    ) -> auth_pb2.GetUserDevicesResponse:
        lists = await self._auth.devices.lists(_ids("user_ids", request.user_ids))
        return auth_pb2.GetUserDevicesResponse(
            lists=[
                auth_pb2.DeviceList(
                    user_id=str(found.user_id),
                    epoch=found.epoch,
                    devices=[_device(device) for device in found.devices],
                )
                for found in lists
            ]
        )

    async def GetDeviceTokens(
        self, request: auth_pb2.GetDeviceTokensRequest, context: Call
    ) -> auth_pb2.GetDeviceTokensResponse:
        tokens = await self._auth.push_tokens.of(
            _ids("user_ids", request.user_ids), _ids("device_ids", request.device_ids)
        )
        return auth_pb2.GetDeviceTokensResponse(tokens=[_token(token) for token in tokens])

    async def GetDeviceInfo(
        self, request: auth_pb2.GetDeviceInfoRequest, context: Call
    ) -> auth_pb2.GetDeviceInfoResponse:
        device = await self._auth.devices.info(read_id("device_id", request.device_id))
        return auth_pb2.GetDeviceInfoResponse(device=_device(device))

    async def ValidateDevice(
        self, request: auth_pb2.ValidateDeviceRequest, context: Call
    ) -> auth_pb2.ValidateDeviceResponse:
        reason = await self._auth.devices.validate(
            read_id("user_id", request.user_id), read_id("device_id", request.device_id)
        )
        return auth_pb2.ValidateDeviceResponse(valid=not reason, reason=reason)

    async def ReportDeviceDelivery(
        self, request: auth_pb2.ReportDeviceDeliveryRequest, context: Call
    ) -> auth_pb2.ReportDeviceDeliveryResponse:
        operation_id = read_id("operation_id", request.operation_id)
        _bounded("deliveries", len(request.deliveries))
        reports = [_report(item) for item in request.deliveries]
        return auth_pb2.ReportDeviceDeliveryResponse(
            applied=await self._auth.push_tokens.report(operation_id, reports)
        )

    async def CleanupExpiredSessions(
        self, request: auth_pb2.CleanupExpiredSessionsRequest, context: Call
    ) -> auth_pb2.CleanupExpiredSessionsResponse:
        # Cleaning twice is cleaning once, so the operation needs no record; a caller without one is still wrong.
        read_id("operation_id", request.operation_id)
        cleaned = await self._auth.housekeeping.clean()
        return auth_pb2.CleanupExpiredSessionsResponse(
            sessions_removed=cleaned.sessions, revocations_removed=cleaned.revocations
        )

    async def RotateKeys(
        self, request: auth_pb2.RotateKeysRequest, context: Call
    ) -> auth_pb2.RotateKeysResponse:
        kind: KeyKind = read_choice("kind", request.kind, get_args(KeyKind))
        rotated, key_id = await self._auth.housekeeping.rotate_keys(
            read_id("operation_id", request.operation_id), kind, force=request.force
        )
        return auth_pb2.RotateKeysResponse(rotated=rotated, key_id=key_id)

    async def GetJwks(self, request: auth_pb2.GetJwksRequest, context: Call) -> auth_pb2.GetJwksResponse:
        return auth_pb2.GetJwksResponse(jwks=msgspec.json.encode(await self._auth.source.jwks()).decode())

    async def GetRevocations(
        self, request: auth_pb2.GetRevocationsRequest, context: Call
    ) -> auth_pb2.GetRevocationsResponse:
        revocations = await self._auth.source.revocations(read_time("since", request.since))
        return auth_pb2.GetRevocationsResponse(
            revocations=[
                auth_pb2.Revocation(subject=item.subject, id=str(item.id), at=as_timestamp(item.at))
                for item in revocations
            ]
        )


def register(auth: Auth, identity: Identity) -> Callable[[grpc.aio.Server], None]:
    """What puts the servicer on a server."""

    def add(server: grpc.aio.Server) -> None:
        auth_pb2_grpc.add_AuthServiceServicer_to_server(AuthServicer(auth, identity), server)

    return add


def _bounded(field: str, count: int) -> None:
    if count > BATCH:
        raise Invalid(f"{field} holds more than {BATCH}.", field=field)


def _ids(field: str, texts: Iterable[str]) -> list[UUID]:
    ids = read_ids(field, texts)
    _bounded(field, len(ids))
    return ids


def _report(item: auth_pb2.DeviceDelivery) -> DeliveryReport:
    channel: PushChannel = read_choice("channel", item.channel, get_args(PushChannel))
    outcome: DeliveryOutcome = read_choice("outcome", item.outcome, get_args(DeliveryOutcome))
    if not item.HasField("token_updated_at"):
        # Without it the report could kill a token that was set after it.
        raise Invalid("token_updated_at is needed.", field="token_updated_at")
    return DeliveryReport(
        device_id=read_id("device_id", item.device_id),
        channel=channel,
        outcome=outcome,
        token_updated_at=read_time("token_updated_at", item.token_updated_at),
    )


def _user(account: AccountInfo) -> auth_pb2.UserInfo:
    return auth_pb2.UserInfo(
        user_id=str(account.user_id),
        username=account.username or "",
        status=account.status,
        created_at=as_timestamp(account.created_at),
        roles=account.roles,
    )


def _device(device: Device) -> auth_pb2.Device:
    return auth_pb2.Device(
        device_id=str(device.id),
        user_id=str(device.account_id),
        name=device.name,
        platform=device.platform,
        registration_id=device.registration_id,
        identity_key=device.identity_key,
        signing_key=device.signing_key,
        created_at=as_timestamp(device.created_at),
        last_seen_at=as_timestamp(datetime.combine(device.last_seen_day, time(), UTC)),
        is_active=device.active,
        has_push_token=device.has_push_token,
    )


def _token(token: PushToken) -> auth_pb2.DeviceToken:
    return auth_pb2.DeviceToken(
        user_id=str(token.user_id),
        device_id=str(token.device_id),
        platform=token.platform,
        channel=token.channel,
        token=token.token,
        app_id=token.app_id,
        environment=token.environment,
        updated_at=as_timestamp(token.updated_at),
        epoch=token.epoch,
    )
