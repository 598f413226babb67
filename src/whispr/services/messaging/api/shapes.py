"""The shapes of the REST door, as its OpenAPI document shows them."""

from __future__ import annotations

import binascii
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, WithJsonSchema

from whispr.kit.http import Body
from whispr.services.messaging.models import MAX_EXPIRY_SECONDS, MAX_MEMBERS, BadSignature

MIN_RETENTION_SECONDS = 3600
"""Shorter, and a message sent again after a lost answer could find its first copy gone."""

MAX_RETENTION_SECONDS = 3660 * 24 * 3600
MAX_SEQ = 2**53 - 1
"""JSON readers lose integers above it."""

Seq = Annotated[int, Field(ge=0, le=MAX_SEQ)]
MemberIds = Annotated[
    list[UUID],
    Field(max_length=10 * MAX_MEMBERS, description="User ids. Repeated ones and one's own count once."),
]
Document = dict[str, Any]
ConversationTypeName = Literal["direct", "group"]
RoleName = Literal["owner", "admin", "member"]

_BASE64 = {"type": "string", "contentEncoding": "base64"}
_COMMITMENT = {
    **_BASE64,
    "description": "32 bytes: HMAC-SHA-256 of the plaintext under a key that travels inside the encryption. A report that"
    " shows both can be verified.",
}
_ENVELOPES = {
    "type": "object",
    "propertyNames": {"format": "uuid"},
    "additionalProperties": {
        "type": "object",
        "properties": {
            "type": {"enum": ["prekey", "message", "sender_key"]},
            "body": _BASE64,
            "registration_id": {
                "type": "integer",
                "minimum": 1,
                "maximum": 16380,
                "description": "The installation it was encrypted for; another one is reported as stale.",
            },
        },
        "required": ["type", "body"],
        "additionalProperties": False,
    },
}
# Checked by the rules of sending, not here: sockets and REST refuse the same things with the same codes.
SentContent = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "description": "CONTENT: one ciphertext for everybody or an envelope for each device; at most 96 KiB.",
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"ciphertext": _BASE64, "commitment": _COMMITMENT},
                    "required": ["ciphertext"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {"envelopes": _ENVELOPES, "commitment": _COMMITMENT},
                    "required": ["envelopes"],
                    "additionalProperties": False,
                },
            ],
        }
    ),
]
MessageType = Annotated[
    str,
    Field(
        max_length=64,
        description="`system` is between clients: it is not counted as unread, not `last_message`, and nobody is notified.",
        json_schema_extra={"enum": ["text", "media", "system"]},
    ),
]


class ConversationCreation(Body):
    """What a conversation is made of."""

    type: ConversationTypeName
    member_ids: MemberIds
    metadata: Document = Field(
        default_factory=dict, description="Any object of the clients' own, at most 8 KiB."
    )


class PermissionsChange(Body):
    """The least role that may do each thing; what is left out or null stays."""

    send: RoleName | None = None
    add_members: RoleName | None = None
    pin: RoleName | None = None
    edit_metadata: RoleName | None = None


class ConversationChange(Body):
    """What to change; what is left out or null stays."""

    metadata: Document | None = Field(None, description="Replaces the whole object, for everybody.")
    settings: Document | None = Field(
        None, description="Replaces the caller's own settings, seen by nobody else."
    )
    permissions: PermissionsChange | None = Field(None, description="Of a group, by its owner.")
    retention_seconds: int | None = Field(
        None,
        ge=MIN_RETENTION_SECONDS,
        le=MAX_RETENTION_SECONDS,
        description="Messages older than this are purged for everybody. Null, unlike left out, keeps them as long as the"
        " server does.",
    )


class MemberAddition(Body):
    """Who joins, and as what."""

    member_ids: Annotated[MemberIds, Field(min_length=1)]
    role: RoleName = Field("member", description="Below the caller's own.")


class RoleChange(Body):
    """`owner` hands the group over; its owner so far becomes an admin."""

    role: RoleName


class MessageCreation(Body):
    """A message, signed by the calling device."""

    conversation_id: UUID
    client_id: UUID = Field(
        description="Made by the client. Sending it again answers the first result again."
    )
    message_type: MessageType
    content: SentContent
    signature: str = Field(
        max_length=128,
        description="Base64 of the Ed25519 signature by the calling device over"
        ' SHA-256("whispr-message-v1" ‖ conversation_id ‖ client_id ‖ SHA-256(canonical JSON of content)).',
    )
    reply_to_id: UUID | None = None
    media_ids: list[UUID] | None = Field(None, max_length=100)
    expires_in: int | None = Field(
        None, ge=1, le=MAX_EXPIRY_SECONDS, description="Seconds after which the message is erased."
    )
    expires_from: Literal["sent", "read"] = Field(
        "sent", description="What the seconds count from; `read`: when every recipient has read it."
    )
    send_at: AwareDatetime | None = Field(
        None, description="Send it then: between now and a year from now. Answered with 202."
    )


class MessageEdit(Body):
    """New content of a message, signed by the calling device."""

    content: SentContent
    signature: str = Field(
        max_length=128, description="As when sending, with the `client_id` of the message that is edited."
    )


class Mark(Body):
    """Everything up to `seq`. A watermark only grows; past the head it stops at the head."""

    seq: Seq


def decode_signature(text: str) -> bytes:
    """The bytes of a signature. Raises `BadSignature`."""
    try:
        return binascii.a2b_base64(text.encode(), strict_mode=True)
    except ValueError:
        raise BadSignature from None


class _View(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MemberView(_View):
    """MEMBER."""

    user_id: UUID
    role: RoleName
    joined_at: datetime
    delivered_seq: int
    read_seq: int | None = Field(description="Null for a person who keeps their reading private.")


class ContentView(_View):
    """CONTENT as the calling device gets it: the shared ciphertext, or its own envelope if there is one for it."""

    ciphertext: str | None = None
    envelopes: dict[UUID, dict[str, Any]] | None = None
    commitment: str | None = None


class ReactionView(_View):
    """One reaction and who chose it, the first one first."""

    reaction: str
    user_ids: list[UUID]


class MessageView(_View):
    """MESSAGE."""

    id: UUID
    conversation_id: UUID
    seq: int
    sender_id: UUID
    sender_device_id: UUID
    client_id: UUID
    message_type: Literal["text", "media", "system"]
    content: ContentView
    content_sha256: str = Field(description="Base64 of SHA-256 of the canonical content that was signed.")
    signature: str
    reply_to_id: UUID | None
    media_ids: list[UUID]
    expires_in: int | None
    sent_at: datetime
    edited_at: datetime | None
    is_deleted: bool
    reactions: list[ReactionView]
    edited_device_id: UUID | None = Field(
        None, description="Signed the present content, where it is not `sender_device_id`."
    )
    expires_from: Literal["sent", "read"] | None = None
    expires_at: datetime | None = Field(None, description="When the message will be erased, once known.")


class PermissionsView(_View):
    """The least role that may do each thing. In a direct conversation both may do all but add a third."""

    send: RoleName
    add_members: RoleName
    pin: RoleName
    edit_metadata: RoleName


class PinView(_View):
    """A pinned message."""

    message_id: UUID
    pinned_by: UUID
    pinned_at: datetime
    message: MessageView


class ConversationView(_View):
    """CONVERSATION as the caller sees it."""

    id: UUID
    type: ConversationTypeName
    metadata: Document
    is_active: bool = Field(description="False once it is closed: history stays, nobody sends.")
    permissions: PermissionsView
    retention_seconds: int | None = Field(description="Age at which messages are erased, null for never.")
    created_by: UUID
    created_at: datetime
    updated_at: datetime
    head_seq: int = Field(description="`seq` of the newest event, 0 before the first.")
    role: RoleName = Field(description="The caller's own.")
    settings: Document = Field(description="The caller's own.")
    delivered_seq: int = Field(description="The caller's own, over all devices.")
    read_seq: int = Field(description="The caller's own, over all devices.")
    unread_count: int = Field(description="Messages of others that are not read; 1,000 means 1,000 or more.")
    member_count: int
    members: list[MemberView] | None = Field(description="Null for groups in lists.")
    last_message: MessageView | None


class MembersView(_View):
    """The members that were asked for."""

    items: list[MemberView]


class MessagesView(_View):
    """Messages in `seq` order; numbers between them belong to other events."""

    items: list[MessageView]
    head_seq: int


class EventView(_View):
    """EVENT. `payload` is as on the socket; of `new_message` it is MESSAGE."""

    seq: int
    event: str
    payload: dict[str, Any]


class EventsView(_View):
    """A dense stretch of the log."""

    epoch: UUID = Field(description="The database's incarnation; numbers of another one mean nothing.")
    items: list[EventView]
    head_seq: int
    more: bool


class RecipientView(_View):
    """When one recipient got and read the message. Times of old messages are exact to the day."""

    user_id: UUID
    delivered_at: datetime | None
    read_at: datetime | None = Field(description="Null also for a person who keeps their reading private.")


class StatusView(_View):
    """Everybody who could see the message but its sender."""

    items: list[RecipientView]
