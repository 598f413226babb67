"""Routes of messages, the log and receipts."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Query, Response

from whispr.kit.http import CallerDep, LimitParam, Problem
from whispr.kit.identity import Caller
from whispr.services.messaging.api import answers
from whispr.services.messaging.api.scheduled import ScheduledAnswer, accepted
from whispr.services.messaging.api.shapes import (
    MAX_SEQ,
    EventsView,
    Mark,
    MessageCreation,
    MessagesView,
    MessageView,
    StatusView,
    decode_signature,
)
from whispr.services.messaging.models import (
    ConversationNotFound,
    Draft,
    NotAMember,
    ReceiptKind,
    render_message,
)
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.history import History
from whispr.services.messaging.service.receipts import Receipts
from whispr.services.messaging.service.scheduled import Scheduled
from whispr.services.messaging.service.sending import Sending
from whispr.services.messaging.service.status import Status

Responses = dict[int | str, dict[str, Any]]

_FORBIDDEN: Responses = {403: {"model": Problem}}
_NOT_FOUND: Responses = {404: {"model": Problem}}
_CONFLICT: Responses = {409: {"model": Problem}}
_TOO_LARGE: Responses = {413: {"model": Problem}}

SeqParam = Annotated[int | None, Query(ge=0, le=MAX_SEQ)]


def add_routes(
    router: APIRouter,
    directory: Directory,
    history: History,
    receipts: Receipts,
    status: Status,
    sending: Sending,
    scheduled: Scheduled,
) -> None:
    """Put the routes on `router`."""
    _add_sending(router, sending, scheduled)
    _add_history(router, directory, history)
    _add_receipts(router, directory, receipts, status)


def _add_sending(router: APIRouter, sending: Sending, scheduled: Scheduled) -> None:
    @router.post(
        "/messages",
        status_code=201,
        response_model=MessageView,
        responses={
            200: {"model": MessageView, "description": "It had been sent before."},
            202: {"model": ScheduledAnswer, "description": "It will be sent at `send_at`."},
        }
        | _FORBIDDEN
        | _NOT_FOUND
        | _CONFLICT
        | _TOO_LARGE,
        tags=["messages"],
    )
    async def send_message(caller: CallerDep, body: MessageCreation) -> Response:
        """Send a message; it is stored when this answers.

        The same `client_id` from the same device answers the first result again with 200, or 409
        `client_id_conflict` if the content differs. With envelopes, their devices must be exactly the members' current
        ones but the calling one: else 409 `devices_mismatch` with `missing` (and their `owners`), `extra` and `stale`.

        With `send_at` it is held to the same rules, kept, and sent then: 202. If the devices are others by then, its
        author's devices are asked to encrypt it again (`needs_reencrypt`).
        """
        draft = _draft(caller, body)
        try:
            if body.send_at is not None:
                return accepted(await scheduled.schedule(draft, body.send_at))
            result = await sending.send(draft)
        except NotAMember:
            raise ConversationNotFound from None
        return answers.json_answer(
            render_message(result.message, caller.device_id), 200 if result.duplicate else 201
        )


def _draft(caller: Caller, body: MessageCreation) -> Draft:
    return Draft(
        conversation_id=body.conversation_id,
        sender_id=caller.user_id,
        sender_device_id=caller.device_id,
        client_id=body.client_id,
        message_type=body.message_type,
        content=msgspec.json.encode(body.content),
        signature=decode_signature(body.signature),
        reply_to_id=body.reply_to_id,
        media_ids=tuple(body.media_ids or ()),
        expires_in=body.expires_in,
        expires_from_read=body.expires_from == "read",
    )


def _add_history(router: APIRouter, directory: Directory, history: History) -> None:
    @router.get(
        "/conversations/{conversation_id}/messages",
        response_model=MessagesView,
        responses=_NOT_FOUND,
        tags=["messages"],
    )
    async def list_messages(
        caller: CallerDep,
        conversation_id: UUID,
        after_seq: SeqParam = None,
        before_seq: SeqParam = None,
        limit: LimitParam = 50,
    ) -> Response:
        """Messages in their present state, in `seq` order: the first after `after_seq`, or the last before `before_seq`.

        With both, the last between them; with neither, the newest.
        """
        membership = await directory.reader(conversation_id, caller.user_id)
        page = await history.messages(membership, after_seq=after_seq, before_seq=before_seq, limit=limit)
        return answers.json_answer(answers.messages(page, caller.device_id))

    @router.get(
        "/conversations/{conversation_id}/events",
        response_model=EventsView,
        responses=_NOT_FOUND,
        tags=["messages"],
    )
    async def list_events(
        caller: CallerDep,
        conversation_id: UUID,
        after_seq: Annotated[int, Query(ge=0, le=MAX_SEQ)] = 0,
        limit: LimitParam = 50,
    ) -> Response:
        """The dense log after `after_seq`, as on the socket: every number once, nothing left out.

        Somebody who joined later sees it from their own `member_added` on.
        """
        membership = await directory.reader(conversation_id, caller.user_id)
        page = await history.events(membership, after_seq=after_seq, limit=limit)
        return answers.json_answer(answers.events(page, caller.device_id))


def _add_receipts(router: APIRouter, directory: Directory, receipts: Receipts, status: Status) -> None:
    async def mark(caller: Caller, conversation_id: UUID, kind: ReceiptKind, body: Mark) -> None:
        membership = await directory.reader(conversation_id, caller.user_id)
        await receipts.mark_now(membership, caller.device_id, kind, body.seq)

    @router.post(
        "/conversations/{conversation_id}/read", status_code=204, responses=_NOT_FOUND, tags=["receipts"]
    )
    async def mark_as_read(caller: CallerDep, conversation_id: UUID, body: Mark) -> None:
        """Everything up to `seq` is read, on all of the caller's devices; that implies delivered."""
        await mark(caller, conversation_id, ReceiptKind.READ, body)

    @router.post(
        "/conversations/{conversation_id}/delivered", status_code=204, responses=_NOT_FOUND, tags=["receipts"]
    )
    async def mark_as_delivered(caller: CallerDep, conversation_id: UUID, body: Mark) -> None:
        """The calling device has everything up to `seq`."""
        await mark(caller, conversation_id, ReceiptKind.DELIVERED, body)

    @router.get(
        "/messages/{message_id}/status", response_model=StatusView, responses=_NOT_FOUND, tags=["receipts"]
    )
    async def get_message_status(caller: CallerDep, message_id: UUID) -> Response:
        """When each recipient got and read the message; any member who can see the message may ask."""
        return answers.json_answer({"items": await status.of(message_id, caller.user_id)})
