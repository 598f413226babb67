"""Routes of single messages: edits, deletions, reactions and pins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Path, Response

from whispr.kit.http import (
    CallerDep,
    CursorParam,
    InvalidCursor,
    LimitParam,
    Page,
    Problem,
    decode_cursor,
    encode_cursor,
)
from whispr.kit.identity import Caller
from whispr.services.messaging.api import answers
from whispr.services.messaging.api.shapes import (
    MessageEdit,
    MessageView,
    PinView,
    ReactionView,
    decode_signature,
)
from whispr.services.messaging.models import (
    Actor,
    ConversationNotFound,
    MessageNotFound,
    NotAMember,
    render_message,
)
from whispr.services.messaging.service.changes import Changes
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.pins import Pins
from whispr.services.messaging.service.reactions import MAX_LENGTH, Reactions

Responses = dict[int | str, dict[str, Any]]

_FORBIDDEN: Responses = {403: {"model": Problem}}
_NOT_FOUND: Responses = {404: {"model": Problem}}
_CONFLICT: Responses = {409: {"model": Problem}}
_TOO_LARGE: Responses = {413: {"model": Problem}}

# Any text, so a slash too: the parameter reaches to the end of the path.
ReactionParam = Annotated[
    str,
    Path(max_length=MAX_LENGTH, description="1 to 64 characters: an emoji or a token of the clients' own."),
]


class _Position(msgspec.Struct, array_like=True):
    """Where a page of pins ended."""

    pinned_at: Annotated[datetime, msgspec.Meta(tz=True)]
    message_id: UUID


def add_routes(
    router: APIRouter, directory: Directory, changes: Changes, reactions: Reactions, pins: Pins
) -> None:
    """Put the routes on `router`."""
    _add_messages(router, changes)
    _add_reactions(router, changes, reactions)
    _add_pins(router, directory, pins)


def _add_messages(router: APIRouter, changes: Changes) -> None:
    @router.get("/messages/{message_id}", response_model=MessageView, responses=_NOT_FOUND, tags=["messages"])
    async def get_message(caller: CallerDep, message_id: UUID) -> Response:
        """One message in its present state, for members who can see it."""
        message = await changes.read(message_id, caller.user_id)
        return answers.json_answer(render_message(message, caller.device_id))

    @router.patch(
        "/messages/{message_id}",
        response_model=MessageView,
        responses=_FORBIDDEN | _NOT_FOUND | _CONFLICT | _TOO_LARGE,
        tags=["messages"],
    )
    async def edit_message(caller: CallerDep, message_id: UUID, body: MessageEdit) -> Response:
        """Put new content in place of a message's own, from any of its author's devices.

        It is signed by the calling device with the `client_id` of the message, and with envelopes, their devices must be
        exactly the members' current ones but the calling one. The same edit again changes nothing.
        """
        with _unknown_to_strangers():
            message, _ = await changes.edit(
                _actor(caller),
                await changes.place(message_id),
                message_id,
                msgspec.json.encode(body.content),
                decode_signature(body.signature),
            )
        return answers.json_answer(render_message(message, caller.device_id))

    @router.delete(
        "/messages/{message_id}", status_code=204, responses=_FORBIDDEN | _NOT_FOUND, tags=["messages"]
    )
    async def delete_message(caller: CallerDep, message_id: UUID) -> None:
        """Erase a message for everybody; only its place in the log stays.

        The author may, and in groups the owner and admins for people whose role is below theirs or who have left.
        """
        with _unknown_to_strangers():
            await changes.delete(_actor(caller), await changes.place(message_id), message_id)


def _add_reactions(router: APIRouter, changes: Changes, reactions: Reactions) -> None:
    @router.get(
        "/messages/{message_id}/reactions",
        response_model=Page[ReactionView],
        responses=_NOT_FOUND,
        tags=["reactions"],
    )
    async def list_reactions(caller: CallerDep, message_id: UUID) -> Response:
        """Who reacted how, first use first; at most 20 different ones, so there is one page."""
        message = await changes.read(message_id, caller.user_id)
        return answers.json_answer({"items": message.head.reactions, "next_cursor": None})

    @router.put(
        "/messages/{message_id}/reactions/{reaction:path}",
        status_code=204,
        responses=_FORBIDDEN | _NOT_FOUND | _CONFLICT,
        tags=["reactions"],
    )
    async def add_reaction(caller: CallerDep, message_id: UUID, reaction: ReactionParam) -> None:
        """React to a message: at most 5 reactions of one person, 20 different ones of all."""
        with _unknown_to_strangers():
            await reactions.add(_actor(caller), await changes.place(message_id), message_id, reaction)

    @router.delete(
        "/messages/{message_id}/reactions/{reaction:path}",
        status_code=204,
        responses=_NOT_FOUND,
        tags=["reactions"],
    )
    async def remove_reaction(caller: CallerDep, message_id: UUID, reaction: ReactionParam) -> None:
        """Take a reaction back."""
        with _unknown_to_strangers():
            await reactions.remove(_actor(caller), await changes.place(message_id), message_id, reaction)


def _add_pins(router: APIRouter, directory: Directory, pins: Pins) -> None:
    @router.get(
        "/conversations/{conversation_id}/pins",
        response_model=Page[PinView],
        responses=_NOT_FOUND,
        tags=["pins"],
    )
    async def list_pins(
        caller: CallerDep, conversation_id: UUID, limit: LimitParam = 50, cursor: CursorParam = None
    ) -> Response:
        """Pinned messages the caller can see, the latest pinned first."""
        before = _position(cursor) if cursor is not None else None
        membership = await directory.reader(conversation_id, caller.user_id)
        page, following = await pins.list_page(membership, before, limit)
        return answers.json_answer(
            {
                "items": [answers.pin(item, caller.device_id) for item in page],
                "next_cursor": encode_cursor(following) if following is not None else None,
            }
        )

    @router.put(
        "/conversations/{conversation_id}/pins/{message_id}",
        status_code=204,
        responses=_FORBIDDEN | _NOT_FOUND | _CONFLICT,
        tags=["pins"],
    )
    async def pin_message(caller: CallerDep, conversation_id: UUID, message_id: UUID) -> None:
        """Pin a message (in groups: whom the permissions allow it); at most 100 a conversation."""
        with _no_conversation_of_strangers():
            await pins.pin(_actor(caller), conversation_id, message_id)

    @router.delete(
        "/conversations/{conversation_id}/pins/{message_id}",
        status_code=204,
        responses=_FORBIDDEN | _NOT_FOUND | _CONFLICT,
        tags=["pins"],
    )
    async def unpin_message(caller: CallerDep, conversation_id: UUID, message_id: UUID) -> None:
        """Unpin a message (in groups: whom the permissions allow it)."""
        with _no_conversation_of_strangers():
            await pins.unpin(_actor(caller), conversation_id, message_id)


def _actor(caller: Caller) -> Actor:
    return Actor(caller.user_id, caller.device_id)


@contextmanager
def _unknown_to_strangers() -> Iterator[None]:
    """One answer to strangers and for what does not exist."""
    try:
        yield
    except NotAMember:
        raise MessageNotFound from None


@contextmanager
def _no_conversation_of_strangers() -> Iterator[None]:
    try:
        yield
    except NotAMember:
        raise ConversationNotFound from None


def _position(cursor: str) -> tuple[datetime, UUID]:
    position = decode_cursor(cursor, _Position)
    try:
        return position.pinned_at.astimezone(UTC), position.message_id
    except OverflowError as error:
        raise InvalidCursor from error
