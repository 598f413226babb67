"""What the application is told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec


class ChatMessage(msgspec.Struct, frozen=True):
    """A message as this device reads it.

    `kind` is the payload's (`text`, `sender_key`, or the application's own), or `deleted` for what was deleted or has
    expired. `error` says why the device cannot read it (see `Undecryptable`); `text` and `data` are then empty.
    `verified` is False when the sending device's keys are only known from the message itself, because the server no
    longer has the device. `reactions` has who chose each, both sorted. `content_sha256` tells one version from another.
    """

    id: UUID
    conversation_id: UUID
    seq: int
    sender_id: UUID
    sender_device_id: UUID
    client_id: UUID
    sent_at: datetime
    kind: str
    text: str | None = None
    data: dict[str, Any] = {}
    reply_to_id: UUID | None = None
    verified: bool = True
    error: str | None = None
    media_ids: list[UUID] = []
    edited_at: datetime | None = None
    is_deleted: bool = False
    reactions: dict[str, list[UUID]] = {}
    expires_in: int | None = None
    expires_from: str = "sent"
    content_sha256: str = ""


class ConversationEvent(msgspec.Struct, frozen=True):
    """One entry of a conversation's log. `message` is the message it is about, as it is after it, if this device has it."""

    conversation_id: UUID
    seq: int
    event: str
    payload: dict[str, Any]
    message: ChatMessage | None = None


class Notice(msgspec.Struct, frozen=True):
    """Anything that is not in a log: `receipt`, `typing`, `presence_state`, `presence_diff`, the pushes of the user's own
    topic, and from the library itself `identity_changed` (a known device has other keys), `device_added` (a known person
    has a new device), `history_truncated`, `history_reset`, `conversation_closed`, `send_failed`, `session_ended`,
    `message_expired` (this device has erased it)."""

    name: str
    payload: dict[str, Any]
    conversation_id: UUID | None = None


OnEvent = Callable[[ConversationEvent], Awaitable[None] | None]
OnNotice = Callable[[Notice], None]
