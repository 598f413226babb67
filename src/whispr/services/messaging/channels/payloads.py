"""What clients push and how it is decoded: strict types, bounded, unknown fields ignored."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec

from whispr.services.messaging.models import MAX_EXPIRY_SECONDS
from whispr.services.messaging.service.opening import Cursor

_Seq = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class NewMessage(msgspec.Struct):
    """`new_message`, as `POST /messages` without the conversation."""

    client_id: UUID
    message_type: str
    content: msgspec.Raw
    signature: bytes
    reply_to_id: UUID | None = None
    media_ids: Annotated[tuple[UUID, ...], msgspec.Meta(max_length=100)] | None = None
    expires_in: Annotated[int, msgspec.Meta(ge=1, le=MAX_EXPIRY_SECONDS)] | None = None
    expires_from: Literal["sent", "read"] = "sent"
    send_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


class Ack(msgspec.Struct):
    """The reply to `new_message`."""

    id: UUID
    seq: int
    sent_at: datetime
    duplicate: bool


class Edit(msgspec.Struct):
    """`edit_message`, as `PATCH /messages/{id}`."""

    message_id: UUID
    content: msgspec.Raw
    signature: bytes


class OfMessage(msgspec.Struct):
    """`delete_message`, `pin_message`, `unpin_message`."""

    message_id: UUID


class OfReaction(msgspec.Struct):
    """`add_reaction`, `remove_reaction`."""

    message_id: UUID
    reaction: str


class Mark(msgspec.Struct):
    """`mark_as_delivered`, `mark_as_read`."""

    seq: _Seq


class Typing(msgspec.Struct):
    """`typing`."""

    state: Literal["start", "stop"]


class Sync(msgspec.Struct):
    """`sync`: events with `after_seq < seq <= until_seq`."""

    after_seq: _Seq
    until_seq: _Seq | None = None


class _Join(msgspec.Struct):
    cursor: Cursor | None = None


decode_new_message = msgspec.json.Decoder(NewMessage).decode
decode_edit = msgspec.json.Decoder(Edit).decode
decode_of_message = msgspec.json.Decoder(OfMessage).decode
decode_of_reaction = msgspec.json.Decoder(OfReaction).decode
decode_mark = msgspec.json.Decoder(Mark).decode
decode_typing = msgspec.json.Decoder(Typing).decode
decode_sync = msgspec.json.Decoder(Sync).decode

encode = msgspec.json.Encoder().encode


def cursor_of(params: dict[str, Any]) -> Cursor | None:
    """The cursor among a join's parameters. Raises `msgspec.ValidationError`."""
    return msgspec.convert(params, _Join).cursor
