"""Records, events and failures of messaging, and the one encoder of what clients see.

Binary values are base64 in JSON, times RFC 3339 in UTC, ids UUIDs: msgspec does all three by itself.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Final, NewType
from uuid import UUID

import msgspec

from whispr.kit.errors import Failure, Kind

MAX_MEMBERS: Final = 1_000
MAX_CONTENT_BYTES: Final = 96 * 1024
MAX_METADATA_BYTES: Final = 8 * 1024
MESSAGE_TYPES: Final = frozenset({"text", "media", "system"})

MemberId = NewType("MemberId", UUID)
"""A user id that passed the membership check of one conversation. Only `service.directory` makes one."""


class ConversationType(StrEnum):
    """Two people, or a group with roles."""

    DIRECT = "direct"
    GROUP = "group"


class Role(StrEnum):
    """What a member may do. In a direct conversation both are plain members."""

    OWNER = "owner"
    ADMIN = "admin"
    MEMBER = "member"

    @property
    def rank(self) -> int:
        """Higher acts upon lower."""
        return _RANKS[self]


_RANKS: Final = {Role.MEMBER: 0, Role.ADMIN: 1, Role.OWNER: 2}


class ReceiptKind(StrEnum):
    """What a watermark says of everything up to it."""

    DELIVERED = "delivered"
    READ = "read"


class Membership(msgspec.Struct, frozen=True):
    """Proof that `user_id` is an active member of the conversation. Only `service.directory` makes one.

    `floor_seq`: the person sees events with `seq` above it and none at or below.
    """

    conversation_id: UUID
    user_id: MemberId
    role: Role
    floor_seq: int


class Member(msgspec.Struct, frozen=True, gc=False):
    """An active member as the hot path needs it."""

    role: Role
    floor_seq: int


class Conversation(msgspec.Struct, frozen=True):
    """A conversation as the hot path needs it: its kind and its active members by user id."""

    id: UUID
    type: ConversationType
    is_active: bool
    members: dict[UUID, Member]


class ConversationRow(msgspec.Struct, frozen=True):
    """A row of `conversations`. `last_seq` is the head of its log (0 before the first event)."""

    id: UUID
    type: ConversationType
    metadata: dict[str, Any]
    is_active: bool
    created_by: UUID
    last_seq: int
    created_at: datetime
    updated_at: datetime


class MemberView(msgspec.Struct, frozen=True):
    """MEMBER: what members see of each other."""

    user_id: UUID
    role: Role
    joined_at: datetime
    delivered_seq: int
    read_seq: int


class MemberRow(msgspec.Struct, frozen=True):
    """A row of `conversation_members`, former members included."""

    conversation_id: UUID
    user_id: UUID
    role: Role
    settings: dict[str, Any]
    joined_at: datetime
    floor_seq: int
    is_active: bool
    delivered_seq: int
    read_seq: int

    def view(self) -> MemberView:
        """Without what is the person's own business."""
        return MemberView(self.user_id, self.role, self.joined_at, self.delivered_seq, self.read_seq)


class MessageHead(msgspec.Struct, frozen=True):
    """MESSAGE without its content: the part that is the same for every device."""

    id: UUID
    conversation_id: UUID
    seq: int
    sender_id: UUID
    sender_device_id: UUID
    client_id: UUID
    message_type: str
    signature: bytes
    content_sha256: bytes
    reply_to_id: UUID | None
    media_ids: tuple[UUID, ...]
    expires_in: int | None
    sent_at: datetime
    edited_at: datetime | None
    is_deleted: bool
    reactions: tuple[()] = ()


class Message(msgspec.Struct, frozen=True):
    """A stored message. `content` is the canonical JSON that was signed, envelopes of all devices included."""

    head: MessageHead
    content: bytes


class Content(msgspec.Struct, frozen=True):
    """A message's content, ready to be written to devices: exactly one of the two is set.

    `shared`: the JSON everyone gets. `envelopes`: by device, the JSON `{"envelopes":{DEVICE_ID:{…}}}` that device gets.
    """

    shared: bytes | None
    envelopes: dict[UUID, bytes] | None

    def for_device(self, device_id: UUID) -> bytes:
        """The JSON of `content` for one device; a device without an envelope gets none of the others'."""
        if self.envelopes is None:
            return self.shared or b"{}"
        return self.envelopes.get(device_id, NO_ENVELOPE)


class CommittedEvent(msgspec.Struct, frozen=True):
    """One entry of a conversation's log, after its commit.

    `payload` is the JSON everybody shares. For `new_message` it is MESSAGE without `content`: a writer puts
    `,"content":…}` in place of its last byte, with `content.for_device(…)`. `content` is None for other events.
    """

    conversation_id: UUID
    seq: int
    event: str
    payload: bytes
    content: Content | None = None


class Draft(msgspec.Struct, frozen=True):
    """A message someone wants to send, from either door, unchecked but for its types.

    `content` is CONTENT as JSON, as the client wrote it; `signature` is raw bytes.
    """

    conversation_id: UUID
    sender_id: UUID
    sender_device_id: UUID
    client_id: UUID
    message_type: str
    content: bytes
    signature: bytes
    reply_to_id: UUID | None = None
    media_ids: tuple[UUID, ...] = ()
    expires_in: int | None = None


class SendResult(msgspec.Struct, frozen=True):
    """What became of a draft. `duplicate`: it had been stored before, and this is the first answer again."""

    message: Message
    duplicate: bool


class EventsPage(msgspec.Struct, frozen=True):
    """A stretch of the log. `more`: there are events between the last item and `head_seq`."""

    epoch: UUID
    items: list[CommittedEvent]
    head_seq: int
    more: bool


class MessagesPage(msgspec.Struct, frozen=True):
    """Messages in `seq` order, in their present state; numbers between belong to other events."""

    items: list[Message]
    head_seq: int


class UndeliveredPage(msgspec.Struct, frozen=True):
    """Events a device has not acknowledged, of one conversation.

    `more`: another page of the same conversation follows. `truncated`: older ones exist that are not pushed, because
    the device is new here; history has them.
    """

    conversation_id: UUID
    items: list[CommittedEvent]
    head_seq: int
    more: bool
    truncated: bool


class Watermark(msgspec.Struct, frozen=True):
    """How far one person has got in one conversation. `previous_*` is where they stood before the change."""

    conversation_id: UUID
    user_id: UUID
    delivered_seq: int
    read_seq: int
    previous_delivered_seq: int
    previous_read_seq: int


class RecipientStatus(msgspec.Struct, frozen=True):
    """When one recipient got and read a message, if they did."""

    user_id: UUID
    delivered_at: datetime | None
    read_at: datetime | None


class ConversationView(msgspec.Struct, frozen=True):
    """CONVERSATION as one of its members sees it.

    `members` is None in lists of groups, where only `member_count` is told. `unread_count` stops at 1,000.
    """

    id: UUID
    type: ConversationType
    metadata: dict[str, Any]
    is_active: bool
    created_by: UUID
    created_at: datetime
    updated_at: datetime
    head_seq: int
    role: Role
    settings: dict[str, Any]
    delivered_seq: int
    read_seq: int
    unread_count: int
    member_count: int
    members: list[MemberView] | None
    last_message: Message | None


NO_ENVELOPE: Final = b'{"envelopes":{}}'

_encode = msgspec.json.Encoder().encode


class _StoredContent(msgspec.Struct):
    envelopes: dict[str, msgspec.Raw] | None = None


_decode_content = msgspec.json.Decoder(_StoredContent).decode


def split_content(content: bytes) -> Content:
    """Prepare stored content for delivery: an envelope is cut out for each device without parsing its body."""
    envelopes = _decode_content(content).envelopes
    if envelopes is None:
        return Content(shared=content, envelopes=None)
    return Content(
        shared=None,
        envelopes={
            UUID(device): b'{"envelopes":{"%b":%b}}' % (device.encode(), bytes(envelope))
            for device, envelope in envelopes.items()
        },
    )


def message_event(message: Message) -> CommittedEvent:
    """The `new_message` entry of the log for a stored message."""
    head = message.head
    return CommittedEvent(
        conversation_id=head.conversation_id,
        seq=head.seq,
        event="new_message",
        payload=_encode(head),
        content=split_content(message.content),
    )


def render_payload(event: CommittedEvent, device_id: UUID) -> bytes:
    """The JSON of an event's payload as one device gets it."""
    if event.content is None:
        return event.payload
    return b'%b,"content":%b}' % (event.payload[:-1], event.content.for_device(device_id))


def render_event(event: CommittedEvent, device_id: UUID) -> bytes:
    """EVENT, `{seq, event, payload}`, as one device gets it."""
    return b'{"seq":%d,"event":"%b","payload":%b}' % (
        event.seq,
        event.event.encode(),
        render_payload(event, device_id),
    )


def render_message(message: Message, device_id: UUID) -> bytes:
    """MESSAGE as one device gets it."""
    return render_payload(message_event(message), device_id)


class NotAMember(Failure):
    """The conversation does not exist or you are not in it."""

    kind = Kind.FORBIDDEN
    code = "forbidden"


class ConversationNotFound(Failure):
    """There is no such conversation."""

    kind = Kind.NOT_FOUND
    code = "conversation_not_found"


class MessageNotFound(Failure):
    """There is no such message."""

    kind = Kind.NOT_FOUND
    code = "message_not_found"


class MemberNotFound(Failure):
    """This person is not in the conversation."""

    kind = Kind.NOT_FOUND
    code = "member_not_found"


class UnknownUser(Failure):
    """There is no such person. `user_ids` lists who."""

    kind = Kind.NOT_FOUND
    code = "user_not_found"


class NotAllowed(Failure):
    """Your role does not allow this."""

    kind = Kind.FORBIDDEN
    code = "not_allowed"


class Blocked(Failure):
    """One of you has blocked the other."""

    kind = Kind.FORBIDDEN
    code = "blocked"


class ContactsOnly(Failure):
    """This person accepts this only from contacts."""

    kind = Kind.FORBIDDEN
    code = "contacts_only"


class ConversationClosed(Failure):
    """The conversation is closed."""

    kind = Kind.CONFLICT
    code = "conversation_closed"


class NotAGroup(Failure):
    """A direct conversation has no roles and its two members do not change."""

    kind = Kind.CONFLICT
    code = "not_a_group"


class TooManyMembers(Failure):
    """A group has at most 1,000 members."""

    kind = Kind.CONFLICT
    code = "too_many_members"


class IdempotencyConflict(Failure):
    """This Idempotency-Key was used for another conversation."""

    kind = Kind.CONFLICT
    code = "idempotency_conflict"


class ClientIdConflict(Failure):
    """This client_id was used for another message."""

    kind = Kind.CONFLICT
    code = "client_id_conflict"


class DevicesMismatch(Failure):
    """The envelopes are not for exactly the members' current devices."""

    kind = Kind.CONFLICT
    code = "devices_mismatch"


class InvalidMembers(Failure):
    """These members do not make such a conversation."""

    kind = Kind.INVALID
    code = "invalid_members"


class InvalidMetadata(Failure):
    """The object cannot be stored: it is too deep, or holds a number or character JSON in a database cannot."""

    kind = Kind.INVALID
    code = "invalid_metadata"


class InvalidMessageType(Failure):
    """A message is `text`, `media` or `system`."""

    kind = Kind.INVALID
    code = "invalid_message_type"


class InvalidContent(Failure):
    """Content is either a ciphertext or envelopes, in base64."""

    kind = Kind.INVALID
    code = "invalid_content"


class BadSignature(Failure):
    """The signature does not match."""

    kind = Kind.INVALID
    code = "bad_signature"


class UnknownEvent(Failure):
    """This channel has no such event."""

    kind = Kind.INVALID
    code = "unknown_event"


class ContentTooLarge(Failure):
    """A message's content is at most 96 KiB."""

    kind = Kind.TOO_LARGE
    code = "too_large"
