"""Routes of devices and their push tokens."""

from __future__ import annotations

import ipaddress
import re
from base64 import urlsafe_b64decode
from binascii import Error as Base64Error
from datetime import date, datetime
from typing import Annotated, Any
from urllib.parse import urlsplit
from uuid import UUID

import msgspec
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from whispr.kit.errors import Invalid
from whispr.kit.http import (
    Body,
    CallerDep,
    CursorParam,
    LimitParam,
    Page,
    Problem,
    decode_cursor,
    encode_cursor,
    new_router,
)
from whispr.kit.identity import Caller
from whispr.services.auth.api.forms import Key32
from whispr.services.auth.models import Device, NewPushToken, Platform, PushChannel, PushEnvironment
from whispr.services.auth.service import Auth

RESPONSES: dict[int | str, dict[str, Any]] = {401: {"model": Problem}, 404: {"model": Problem}}

_APNS_TOKEN = re.compile(r"[0-9a-fA-F]{64,200}")
_FCM_TOKEN = re.compile(r"[A-Za-z0-9_:\-]{20,4096}")
_P256DH_BYTES, _AUTH_BYTES = 65, 16
_UNCOMPRESSED = 4


class DeviceInfo(BaseModel):
    """A device; `id` is its device_id. `last_seen_on` is a day, no finer."""

    id: UUID
    device_id: UUID
    name: str
    platform: Platform
    registration_id: int
    identity_key: Key32
    signing_key: Key32
    created_at: datetime
    last_seen_on: date
    has_push_token: bool
    current: bool


class SubscriptionKeys(Body):
    """Unpadded base64url, as browsers give it."""

    p256dh: Annotated[str, Field(max_length=100)]
    auth: Annotated[str, Field(max_length=40)]


class Subscription(Body):
    """What `PushManager.subscribe()` gives."""

    endpoint: Annotated[str, Field(min_length=1, max_length=2048)]
    keys: SubscriptionKeys


class PushTokenForm(Body):
    """`token` for apns and fcm, `subscription` for webpush."""

    channel: PushChannel
    token: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    subscription: Subscription | None = None
    app_id: Annotated[str, Field(max_length=255, pattern=r"^[A-Za-z0-9._\-:]*$")] = ""
    environment: PushEnvironment = "production"


class InvalidPushToken(Invalid):
    """This is not a token of that channel."""

    code = "invalid_push_token"


def device_router(auth: Auth, *, loopback_pushes: bool) -> APIRouter:
    """The caller's devices."""
    router = new_router(tags=["devices"])

    @router.get("/api/v1/devices", responses=RESPONSES)
    async def list_devices(
        caller: CallerDep, limit: LimitParam = 50, cursor: CursorParam = None
    ) -> Page[DeviceInfo]:
        """The caller's active devices, oldest first."""
        after = decode_cursor(cursor, UUID) if cursor else None
        found = await auth.devices.page(caller, after, limit + 1)
        more = encode_cursor(found[limit - 1].id) if len(found) > limit else None
        return Page(items=[_info(device, caller) for device in found[:limit]], next_cursor=more)

    @router.delete("/api/v1/devices/{device_id}", status_code=204, responses=RESPONSES)
    async def remove_device(device_id: UUID, caller: CallerDep) -> Response:
        """Remove a device with its sessions and keys."""
        await auth.devices.remove(caller, device_id)
        return Response(status_code=204)

    @router.put("/api/v1/devices/{device_id}/push-token", status_code=204, responses=RESPONSES)
    async def set_push_token(device_id: UUID, form: PushTokenForm, caller: CallerDep) -> Response:
        """Set where pushes for this device go. A token leaves every other device that had it."""
        await auth.push_tokens.put(caller, device_id, push_token(form, loopback=loopback_pushes))
        return Response(status_code=204)

    @router.delete("/api/v1/devices/{device_id}/push-token", status_code=204, responses=RESPONSES)
    async def remove_push_token(device_id: UUID, caller: CallerDep) -> Response:
        """No more pushes for this device."""
        await auth.push_tokens.remove(caller, device_id)
        return Response(status_code=204)

    return router


def push_token(form: PushTokenForm, *, loopback: bool) -> NewPushToken:
    """The token in the form it is kept in. Raises `InvalidPushToken`."""
    if form.channel == "webpush":
        if form.subscription is None or form.token is not None:
            raise InvalidPushToken("webpush takes a subscription and no token.")
        token = _subscription(form.subscription, loopback=loopback)
    else:
        pattern = _APNS_TOKEN if form.channel == "apns" else _FCM_TOKEN
        if form.token is None or form.subscription is not None:
            raise InvalidPushToken(f"{form.channel} takes a token and no subscription.")
        if not pattern.fullmatch(form.token):
            raise InvalidPushToken
        if form.channel == "apns" and not form.app_id:
            raise InvalidPushToken("apns needs the app_id, which is the topic.")
        token = form.token.lower() if form.channel == "apns" else form.token
    return NewPushToken(form.channel, token, form.app_id, form.environment)


def _subscription(subscription: Subscription, *, loopback: bool) -> str:
    try:
        endpoint = urlsplit(subscription.endpoint)
        host, _ = endpoint.hostname, endpoint.port
    except ValueError:
        raise InvalidPushToken("The endpoint is not a URL.") from None
    printable = subscription.endpoint.isascii() and subscription.endpoint.isprintable()
    plain = loopback and endpoint.scheme == "http" and host is not None and _is_loopback(host)
    if not host or not printable or " " in subscription.endpoint or "@" in endpoint.netloc:
        raise InvalidPushToken("The endpoint is not a URL.")
    if endpoint.scheme != "https" and not plain:
        raise InvalidPushToken("The endpoint must be an https URL.")
    p256dh, auth_secret = _unbase64(subscription.keys.p256dh), _unbase64(subscription.keys.auth)
    if len(p256dh) != _P256DH_BYTES or p256dh[0] != _UNCOMPRESSED or len(auth_secret) != _AUTH_BYTES:
        raise InvalidPushToken("The subscription's keys have the wrong size.")
    keys = {"p256dh": subscription.keys.p256dh, "auth": subscription.keys.auth}
    return msgspec.json.encode({"endpoint": subscription.endpoint, "keys": keys}).decode()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _unbase64(text: str) -> bytes:
    try:
        return urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except (Base64Error, ValueError):
        raise InvalidPushToken("The subscription's keys are not base64url.") from None


def _info(device: Device, caller: Caller) -> DeviceInfo:
    return DeviceInfo(
        id=device.id,
        device_id=device.id,
        name=device.name,
        platform=device.platform,
        registration_id=device.registration_id,
        identity_key=device.identity_key,
        signing_key=device.signing_key,
        created_at=device.created_at,
        last_seen_on=device.last_seen_day,
        has_push_token=device.has_push_token,
        current=device.id == caller.device_id,
    )
