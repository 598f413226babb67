"""Routes of conversations and their members."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Response

from whispr.kit.http import (
    CallerDep,
    CursorParam,
    IdempotencyKey,
    InvalidCursor,
    LimitParam,
    Page,
    Problem,
    decode_cursor,
    encode_cursor,
)
from whispr.services.messaging.api import answers
from whispr.services.messaging.api.shapes import (
    ConversationChange,
    ConversationCreation,
    ConversationView,
    MemberAddition,
    MembersView,
    MemberView,
    RoleChange,
)
from whispr.services.messaging.models import ConversationType, Role
from whispr.services.messaging.service.conversations import Conversations
from whispr.services.messaging.service.members import Members

Responses = dict[int | str, dict[str, Any]]

_FORBIDDEN: Responses = {403: {"model": Problem}}
_NOT_FOUND: Responses = {404: {"model": Problem}}
_CONFLICT: Responses = {409: {"model": Problem}}
_TOO_LARGE: Responses = {413: {"model": Problem}}


class _Position(msgspec.Struct, array_like=True):
    """Where a page of conversations ended."""

    updated_at: Annotated[datetime, msgspec.Meta(tz=True)]
    conversation_id: UUID


def add_routes(router: APIRouter, conversations: Conversations, members: Members) -> None:
    """Put the routes on `router`."""
    _add_conversations(router, conversations)
    _add_members(router, members)


def _add_conversations(router: APIRouter, service: Conversations) -> None:
    @router.post(
        "/conversations",
        status_code=201,
        response_model=ConversationView,
        responses={200: {"model": ConversationView, "description": "It exists already."}}
        | _FORBIDDEN
        | _NOT_FOUND
        | _CONFLICT
        | _TOO_LARGE,
        tags=["conversations"],
    )
    async def create_conversation(
        caller: CallerDep, body: ConversationCreation, idempotency_key: IdempotencyKey = None
    ) -> Response:
        """Start a direct conversation or a group; its members are told at once.

        Two people have one direct conversation: asking for it again answers it with 200. A group made with an
        Idempotency-Key is made once, and answered again with 200.
        """
        view, is_new = await service.create(
            caller.user_id, ConversationType(body.type), body.member_ids, body.metadata, idempotency_key
        )
        return answers.json_answer(answers.conversation(view, caller.device_id), 201 if is_new else 200)

    @router.get("/conversations", response_model=Page[ConversationView], tags=["conversations"])
    async def list_conversations(
        caller: CallerDep, limit: LimitParam = 50, cursor: CursorParam = None
    ) -> Response:
        """The caller's conversations, latest activity first, with unread counts and last messages."""
        before = _position(cursor) if cursor is not None else None
        views, following = await service.list_page(caller.user_id, before, limit)
        return answers.json_answer(
            {
                "items": [answers.conversation(view, caller.device_id) for view in views],
                "next_cursor": encode_cursor(following) if following is not None else None,
            }
        )

    @router.get(
        "/conversations/{conversation_id}",
        response_model=ConversationView,
        responses=_NOT_FOUND,
        tags=["conversations"],
    )
    async def get_conversation(caller: CallerDep, conversation_id: UUID) -> Response:
        """One conversation with all its members."""
        view = await service.get(conversation_id, caller.user_id)
        return answers.json_answer(answers.conversation(view, caller.device_id))

    @router.patch(
        "/conversations/{conversation_id}",
        response_model=ConversationView,
        responses=_FORBIDDEN | _NOT_FOUND | _CONFLICT | _TOO_LARGE,
        tags=["conversations"],
    )
    async def change_conversation(
        caller: CallerDep, conversation_id: UUID, body: ConversationChange
    ) -> Response:
        """Change the metadata or the retention (whom the permissions allow it), a group's permissions (its owner) or one's
        own settings.
        """
        wanted = body.permissions.model_dump(exclude_none=True) if body.permissions is not None else {}
        view = await service.change(
            conversation_id,
            caller.user_id,
            body.metadata,
            body.settings,
            {action: Role(role) for action, role in wanted.items()},
            body.retention_seconds if "retention_seconds" in body.model_fields_set else msgspec.UNSET,
        )
        return answers.json_answer(answers.conversation(view, caller.device_id))

    @router.delete(
        "/conversations/{conversation_id}",
        status_code=204,
        responses=_FORBIDDEN | _NOT_FOUND,
        tags=["conversations"],
    )
    async def leave_conversation(caller: CallerDep, conversation_id: UUID) -> None:
        """Leave a group, or as its owner close it for everybody.

        A direct conversation only leaves the caller's list, until something happens in it again; so does a group that
        its owner closes.
        """
        await service.remove(conversation_id, caller.user_id)


def _add_members(router: APIRouter, service: Members) -> None:
    @router.post(
        "/conversations/{conversation_id}/members",
        status_code=201,
        response_model=MembersView,
        responses={200: {"model": MembersView, "description": "All of them were members already."}}
        | _FORBIDDEN
        | _NOT_FOUND
        | _CONFLICT,
        tags=["members"],
    )
    async def add_members(caller: CallerDep, conversation_id: UUID, body: MemberAddition) -> Response:
        """Add people to a group (whom the permissions allow it). They see what happens from now on.

        Who is a member already stays as they are, so the request can be repeated. A group has at most 1,000 members.
        """
        views, any_new = await service.add(conversation_id, caller.user_id, body.member_ids, Role(body.role))
        return answers.json_answer({"items": views}, 201 if any_new else 200)

    @router.patch(
        "/conversations/{conversation_id}/members/{user_id}",
        response_model=MemberView,
        responses=_FORBIDDEN | _NOT_FOUND | _CONFLICT,
        tags=["members"],
    )
    async def change_member(
        caller: CallerDep, conversation_id: UUID, user_id: UUID, body: RoleChange
    ) -> Response:
        """Change a member's role: only below one's own; the owner may hand the group over."""
        return answers.json_answer(
            await service.change_role(conversation_id, caller.user_id, user_id, Role(body.role))
        )

    @router.delete(
        "/conversations/{conversation_id}/members/{user_id}",
        status_code=204,
        responses=_FORBIDDEN | _NOT_FOUND | _CONFLICT,
        tags=["members"],
    )
    async def remove_member(caller: CallerDep, conversation_id: UUID, user_id: UUID) -> None:
        """Take a member of a lower role out of a group, or leave it.

        An owner who leaves is followed by the admin, or else the member, who is in the group the longest.
        """
        await service.remove(conversation_id, caller.user_id, user_id)


def _position(cursor: str) -> tuple[datetime, UUID]:
    position = decode_cursor(cursor, _Position)
    try:
        return position.updated_at.astimezone(UTC), position.conversation_id
    except OverflowError as error:
        # The first or last hours of the calendar, in a zone that puts them outside it: nobody was handed that.
        raise InvalidCursor from error
