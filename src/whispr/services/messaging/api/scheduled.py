"""Routes of scheduled messages, and how one is shown."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from fastapi import APIRouter, Query, Response
from msgspec import UNSET
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from whispr.kit.http import (
    Body,
    CallerDep,
    CursorParam,
    InvalidCursor,
    LimitParam,
    Page,
    Problem,
    decode_cursor,
    encode_cursor,
)
from whispr.services.messaging.api import answers
from whispr.services.messaging.api.shapes import ContentView, SentContent, decode_signature
from whispr.services.messaging.models import (
    MAX_EXPIRY_SECONDS,
    ConversationNotFound,
    NotAMember,
    Plan,
    PlanStatus,
    expires_from,
    split_content,
)
from whispr.services.messaging.service.scheduled import PlanChange, Scheduled

StatusName = Literal["pending", "needs_reencrypt", "sent", "failed", "cancelled"]

_FORBIDDEN: dict[int | str, dict[str, Any]] = {403: {"model": Problem}}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Problem}}
_CONFLICT: dict[int | str, dict[str, Any]] = {409: {"model": Problem}}
_TOO_LARGE: dict[int | str, dict[str, Any]] = {413: {"model": Problem}}


class ScheduledChange(Body):
    """What to change; what is left out stays."""

    content: SentContent | None = Field(None, description="New content; comes with its signature.")
    signature: str | None = Field(
        None,
        max_length=128,
        description="As when sending, by the calling device, with the `client_id` of the message as it was scheduled.",
    )
    send_at: AwareDatetime | None = Field(None, description="Between now and a year from now.")
    reply_to_id: UUID | None = Field(None, description="Null: a reply to nothing.")
    expires_in: int | None = Field(None, ge=1, le=MAX_EXPIRY_SECONDS, description="Null: never.")
    expires_from: Literal["sent", "read"] = "sent"


class _View(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ScheduledAnswer(_View):
    """What was scheduled, now or by the same request before."""

    scheduled_id: UUID
    send_at: datetime
    status: StatusName


class NeedsView(_View):
    """Which devices the envelopes are not for. All empty: the device that signed is gone."""

    missing: list[UUID] = Field(description="Current devices without an envelope.")
    extra: list[UUID] = Field(description="Envelopes for devices that are no recipients.")
    stale: list[UUID] = Field(description="Devices that were set up anew since.")
    owners: dict[UUID, UUID] = Field(description="Whose the missing devices are.")


class ScheduledView(_View):
    """SCHEDULED."""

    id: UUID
    conversation_id: UUID
    client_id: UUID
    sender_device_id: UUID = Field(description="Signed the content.")
    message_type: Literal["text", "media", "system"]
    content: ContentView = Field(description="As the calling device gets it; empty once sent or cancelled.")
    content_sha256: str
    signature: str
    reply_to_id: UUID | None
    media_ids: list[UUID]
    expires_in: int | None
    expires_from: Literal["sent", "read"] | None = None
    send_at: datetime
    status: StatusName
    failure: str | None = Field(description="The code of what keeps it from being sent.")
    needs: NeedsView | None = Field(description="Of one that must be encrypted again.")
    message_id: UUID | None = Field(description="Once it is sent.")
    created_at: datetime
    updated_at: datetime


class _Position(msgspec.Struct, array_like=True):
    """Where a page ended."""

    send_at: Annotated[datetime, msgspec.Meta(tz=True)]
    plan_id: UUID


def add_routes(router: APIRouter, service: Scheduled) -> None:
    """Put the routes on `router`."""
    _add_reading(router, service)
    _add_changes(router, service)


def accepted(plan: Plan) -> Response:
    """The answer to a message that is scheduled."""
    body = {"scheduled_id": plan.id, "send_at": plan.send_at, "status": plan.status}
    return answers.json_answer(body, 202)


def _add_reading(router: APIRouter, service: Scheduled) -> None:
    @router.get("/scheduled-messages", response_model=Page[ScheduledView], tags=["scheduled messages"])
    async def list_scheduled_messages(
        caller: CallerDep,
        status: Annotated[StatusName | None, Query()] = None,
        limit: LimitParam = 50,
        cursor: CursorParam = None,
    ) -> Response:
        """The caller's own, by the time they are to be sent. What ended is kept for a while."""
        after = _position(cursor) if cursor is not None else None
        wanted = None if status is None else PlanStatus(status)
        plans, following = await service.page(caller.user_id, wanted, after, limit)
        return answers.json_answer(
            {
                "items": [_shown(plan, caller.device_id) for plan in plans],
                "next_cursor": encode_cursor(following) if following is not None else None,
            }
        )

    @router.get(
        "/scheduled-messages/{scheduled_id}",
        response_model=ScheduledView,
        responses=_NOT_FOUND,
        tags=["scheduled messages"],
    )
    async def get_scheduled_message(caller: CallerDep, scheduled_id: UUID) -> Response:
        """One of the caller's own."""
        plan = await service.get(caller.user_id, scheduled_id)
        return answers.json_answer(_shown(plan, caller.device_id))


def _add_changes(router: APIRouter, service: Scheduled) -> None:
    @router.patch(
        "/scheduled-messages/{scheduled_id}",
        response_model=ScheduledView,
        responses=_FORBIDDEN | _NOT_FOUND | _CONFLICT | _TOO_LARGE,
        tags=["scheduled messages"],
    )
    async def change_scheduled_message(
        caller: CallerDep, scheduled_id: UUID, body: ScheduledChange
    ) -> Response:
        """Change one until it is sent (409 `already_sent`).

        Any device of the caller's may sign new content. One that `needs_reencrypt` is pending again with it, and goes out
        at once if its time has passed.
        """
        try:
            plan = await service.change(caller.user_id, caller.device_id, scheduled_id, _change(body))
        except NotAMember:
            raise ConversationNotFound from None
        return answers.json_answer(_shown(plan, caller.device_id))

    @router.delete(
        "/scheduled-messages/{scheduled_id}",
        status_code=204,
        responses=_NOT_FOUND | _CONFLICT,
        tags=["scheduled messages"],
    )
    async def cancel_scheduled_message(caller: CallerDep, scheduled_id: UUID) -> None:
        """Cancel one until it is sent (409 `already_sent`). Its content is forgotten."""
        await service.cancel(caller.user_id, scheduled_id)


def _shown(plan: Plan, device_id: UUID) -> dict[str, Any]:
    """SCHEDULED for one device."""
    draft = plan.draft
    content = split_content(draft.content).for_device(device_id) if draft.content else b"{}"
    return {
        "id": plan.id,
        "conversation_id": draft.conversation_id,
        "client_id": draft.client_id,
        "sender_device_id": draft.sender_device_id,
        "message_type": draft.message_type,
        "content": msgspec.Raw(content),
        "content_sha256": plan.content_sha256,
        "signature": draft.signature,
        "reply_to_id": draft.reply_to_id,
        "media_ids": draft.media_ids,
        "expires_in": draft.expires_in,
        **(
            {}
            if draft.expires_in is None
            else {"expires_from": expires_from(draft.expires_in, draft.expires_from_read)}
        ),
        "send_at": plan.send_at,
        "status": plan.status,
        "failure": plan.failure,
        "needs": plan.needs,
        "message_id": plan.message_id,
        "created_at": plan.created_at,
        "updated_at": plan.updated_at,
    }


def _change(body: ScheduledChange) -> PlanChange:
    given = body.model_fields_set
    return PlanChange(
        content=UNSET if body.content is None else msgspec.json.encode(body.content),
        signature=UNSET if body.signature is None else decode_signature(body.signature),
        send_at=UNSET if body.send_at is None else body.send_at,
        reply_to_id=body.reply_to_id if "reply_to_id" in given else UNSET,
        expires_in=body.expires_in if "expires_in" in given else UNSET,
        expires_from_read=body.expires_from == "read" if "expires_from" in given else UNSET,
    )


def _position(cursor: str) -> tuple[datetime, UUID]:
    position = decode_cursor(cursor, _Position)
    try:
        return position.send_at.astimezone(UTC), position.plan_id
    except OverflowError as error:
        # The first or last hours of the calendar, in a zone that puts them outside it: nobody was handed that.
        raise InvalidCursor from error
