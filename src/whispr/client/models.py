"""What the server's answers look like, as contracts name them. Unknown fields are ignored, bytes are base64."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec


class Session(msgspec.Struct, frozen=True):
    """A login. `expires_in` is the access token's life in seconds when it was issued."""

    user_id: UUID
    device_id: UUID
    session_id: UUID
    access_token: str
    expires_in: float
    refresh_token: str
    token_type: str = "Bearer"  # noqa: S105 -- a scheme's name


class Prekey(msgspec.Struct, frozen=True):
    key_id: int
    public_key: bytes
    signature: bytes | None = None


class DeviceKeys(msgspec.Struct, frozen=True):
    device_id: UUID
    registration_id: int
    identity_key: bytes
    signing_key: bytes
    signed_prekey: Prekey
    one_time_prekey: Prekey | None = None
    pq_prekey: Prekey | None = None


class UserKeys(msgspec.Struct, frozen=True):
    user_id: UUID
    devices: list[DeviceKeys]


class Device(msgspec.Struct, frozen=True):
    """One of one's own devices. The server names the id `device_id` or `id`."""

    device_id: UUID
    name: str = ""
    platform: str = ""
    registration_id: int | None = None


class Envelope(msgspec.Struct, frozen=True):
    type: str
    body: str
    registration_id: int | None = None


class Content(msgspec.Struct, frozen=True):
    ciphertext: str | None = None
    envelopes: dict[str, Envelope] | None = None
    commitment: str | None = None


class Reaction(msgspec.Struct, frozen=True):
    reaction: str
    user_ids: list[UUID]


class Message(msgspec.Struct, frozen=True):
    """`content` holds this device's envelope only; `content_sha256` is what the signature covers.

    `edited_device_id` signed the present content, if that is not `sender_device_id`. A deleted message has neither
    content nor signature. `expires_in` is in seconds.
    """

    id: UUID
    conversation_id: UUID
    seq: int
    sender_id: UUID
    sender_device_id: UUID
    client_id: UUID
    message_type: str
    content: Content
    sent_at: datetime
    signature: str = ""
    content_sha256: str = ""
    reply_to_id: UUID | None = None
    media_ids: list[UUID] | None = None
    edited_at: datetime | None = None
    edited_device_id: UUID | None = None
    is_deleted: bool = False
    reactions: list[Reaction] = []
    expires_in: int | None = None
    expires_from: str = "sent"
    expires_at: datetime | None = None

    @property
    def signing_device_id(self) -> UUID:
        return self.edited_device_id or self.sender_device_id


class Member(msgspec.Struct, frozen=True):
    """`read_seq` is None for people who keep their reading private."""

    user_id: UUID
    role: str = "member"
    read_seq: int | None = None


class Conversation(msgspec.Struct, frozen=True):
    id: UUID
    type: str
    members: list[Member] | None = None
    metadata: dict[str, Any] | None = None
    unread_count: int = 0


class LogEvent(msgspec.Struct, frozen=True):
    """One entry of a conversation's dense log."""

    seq: int
    event: str
    payload: msgspec.Raw


class EventsPage(msgspec.Struct, frozen=True):
    epoch: str
    items: list[LogEvent]
    head_seq: int
    more: bool = False


class MessagesPage(msgspec.Struct, frozen=True):
    items: list[Message]
    head_seq: int


class Profile(msgspec.Struct, frozen=True):
    user_id: UUID
    username: str | None = None
    display_name: str | None = None
    avatar_media_id: UUID | None = None


class Sent(msgspec.Struct, frozen=True):
    """The server's receipt for a message: it is committed."""

    id: UUID
    seq: int
    sent_at: datetime
    duplicate: bool = False


class ScheduledMessage(msgspec.Struct, frozen=True):
    """A message the server will send at `send_at`.

    `status`: `pending`, `sent`, `needs_reencrypt`, `failed` (`failure` says why), `cancelled`. `needs` are the devices that
    came and went since it was encrypted.
    """

    id: UUID
    conversation_id: UUID
    client_id: UUID
    send_at: datetime
    status: str
    failure: str | None = None
    message_id: UUID | None = None
    needs: dict[str, Any] | None = None


class Pin(msgspec.Struct, frozen=True):
    message_id: UUID
    pinned_by: UUID
    pinned_at: datetime | None = None


class Report(msgspec.Struct, frozen=True):
    """`is_verified`: what was revealed is what the sender committed to."""

    report_id: UUID
    is_verified: bool = False


class SecondFactor(msgspec.Struct, frozen=True):
    """A code of the authenticator, or one of the recovery codes."""

    totp_code: str | None = None
    recovery_code: str | None = None


class Link(msgspec.Struct, frozen=True):
    """A link for a new device. `token` is for its eyes only: shown as a QR code, say. `expires_in` in seconds."""

    link_id: UUID
    token: str
    expires_in: float


class Claim(msgspec.Struct, frozen=True):
    """What the new device is told. `check_code` is compared with the other device's screen."""

    link_id: UUID
    check_code: str
    expires_in: float


class LinkingDevice(msgspec.Struct, frozen=True):
    name: str
    platform: str
    identity_key: bytes
    signing_key: bytes
    registration_id: int


class LinkStatus(msgspec.Struct, frozen=True):
    """`status`: `waiting`, `claimed`, `confirmed`, `finished`, `expired`, `refused`."""

    status: str
    device: LinkingDevice | None = None
    check_code: str | None = None
