"""The route of the export."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date, datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel

from whispr.kit.http import CallerDep, Problem, new_router
from whispr.services.auth.api.forms import Key32
from whispr.services.auth.models import LinkStatus, Platform, PushChannel, PushEnvironment
from whispr.services.auth.service import Auth


class AccountPart(BaseModel):
    user_id: UUID
    username: str | None
    status: str
    roles: list[str]
    created_at: datetime
    password_changed_at: datetime
    second_factor: bool
    recovery_codes_left: int


class PushTokenPart(BaseModel):
    """Where pushes go; the token itself stays with auth."""

    channel: PushChannel
    app_id: str
    environment: PushEnvironment
    status: str
    updated_at: datetime


class DevicePart(BaseModel):
    """A device, removed ones included: what it signed is still checked with its key."""

    device_id: UUID
    name: str
    platform: Platform
    registration_id: int
    identity_key: Key32
    signing_key: Key32
    status: str
    created_at: datetime
    removed_at: datetime | None
    expired_at: datetime | None
    last_seen_on: date
    signed_prekey_id: int | None
    pq_last_resort_prekey_id: int | None
    one_time_prekey_ids: list[int]
    pq_one_time_prekey_ids: list[int]
    push_tokens: list[PushTokenPart]


class SessionPart(BaseModel):
    session_id: UUID
    device_id: UUID
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    ended_at: datetime | None
    end_reason: str | None


class LinkPart(BaseModel):
    """`by_device_id` began it; `device_id` is the device it made."""

    link_id: UUID
    by_device_id: UUID
    status: LinkStatus
    created_at: datetime
    device_id: UUID | None


class EventPart(BaseModel):
    at: datetime
    event: str
    device_id: UUID | None
    details: dict[str, Any]


class AccountExportView(BaseModel):
    """`events` are the newest 10,000 security events, oldest first."""

    exported_at: datetime
    account: AccountPart
    devices: list[DevicePart]
    sessions: list[SessionPart]
    links: list[LinkPart]
    events: list[EventPart]


def export_router(auth: Auth) -> APIRouter:
    """What auth keeps of the caller."""
    router = new_router(tags=["auth"])

    @router.get("/api/v1/auth/export", responses={401: {"model": Problem}, 404: {"model": Problem}})
    async def export_account(caller: CallerDep) -> AccountExportView:
        """Everything auth keeps of the caller but secrets: account, devices, sessions, links, security events."""
        return AccountExportView.model_validate(asdict(await auth.export.of(caller)))

    return router
