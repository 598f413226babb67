"""Records and events of messaging.

Binary values are base64 in JSON, times RFC 3339 in UTC, ids UUIDs: msgspec does all three by itself.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Literal, NewType
from uuid import UUID

import msgspec

MAX_MEMBERS: Final = 1_000
MAX_CONTENT_BYTES: Final = 96 * 1024
NO_ENVELOPE: Final = b'{"envelopes":{}}'
MAX_EXPIRY_SECONDS: Final = 366 * 24 * 3600
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


class Permissions(msgspec.Struct, frozen=True, omit_defaults=True):
    """The least role that may do each thing in a group. In a direct conversation both may do all."""

    send: Role = Role.MEMBER
    add_members: Role = Role.ADMIN
    pin: Role = Role.ADMIN
    edit_metadata: Role = Role.ADMIN

    def filled(self) -> dict[str, Role]:
        """All of them by name; JSON of the struct itself leaves out what is as by default."""
        return msgspec.structs.asdict(self)

    @classmethod
    def of(cls, conversation_type: ConversationType, stored: object) -> Permissions:
        """From the row of a conversation."""
        return msgspec.convert(stored, cls) if conversation_type is ConversationType.GROUP else _OF_TWO


_OF_TWO: Final = Permissions(pin=Role.MEMBER, edit_metadata=Role.MEMBER, add_members=Role.OWNER)
"""Both people are plain members and may do all but add a third."""


class Conversation(msgspec.Struct, frozen=True):
    """A conversation as the hot path needs it: its kind and its active members by user id."""

    id: UUID
    type: ConversationType
    is_active: bool
    permissions: Permissions
    members: dict[UUID, Member]


class ConversationRow(msgspec.Struct, frozen=True):
    """A row of `conversations`. `last_seq` is the head of its log (0 before the first event), `purged_seq` the last
    event that was removed for ever (0 before the first purge)."""

    id: UUID
    type: ConversationType
    metadata: dict[str, Any]
    is_active: bool
    created_by: UUID
    last_seq: int
    created_at: datetime
    updated_at: datetime
    permissions: Permissions
    retention_seconds: int | None
    purged_seq: int


class MemberView(msgspec.Struct, frozen=True):
    """MEMBER: what members see of each other. `read_seq` is None for a person who keeps their reading private."""

    user_id: UUID
    role: Role
    joined_at: datetime
    delivered_seq: int
    read_seq: int | None


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


class Reaction(msgspec.Struct, frozen=True):
    """One reaction to a message and who chose it, the first one first."""

    reaction: str
    user_ids: tuple[UUID, ...]


class MessageHead(msgspec.Struct, frozen=True):
    """MESSAGE without its content: the part that is the same for every device.

    The last three are left out where they say nothing: `edited_device_id` signed the present content if
    `sender_device_id` did not; `expires_from` is when the seconds of `expires_in` begin; `expires_at` is when they end,
    once that is known.
    """

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
    reactions: tuple[Reaction, ...] = ()
    edited_device_id: UUID | msgspec.UnsetType = msgspec.UNSET
    expires_from: Literal["sent", "read"] | msgspec.UnsetType = msgspec.UNSET
    expires_at: datetime | msgspec.UnsetType = msgspec.UNSET


class Message(msgspec.Struct, frozen=True):
    """A stored message. `content` is the canonical JSON that was signed, envelopes of all devices included."""

    head: MessageHead
    content: bytes


class Pin(msgspec.Struct, frozen=True):
    """A pinned message."""

    message: Message
    pinned_by: UUID
    pinned_at: datetime


class Actor(msgspec.Struct, frozen=True):
    """Who changes something, and from which device."""

    user_id: UUID
    device_id: UUID


class Content(msgspec.Struct, frozen=True):
    """A message's content, ready to be written to devices: exactly one of the two is set.

    `shared`: the JSON everyone gets. `envelopes`: by the text of a device's id, the JSON `{"envelopes":{DEVICE_ID:{…}}}` that
    it gets.
    """

    shared: bytes | None
    envelopes: dict[str, bytes] | None

    def for_device(self, device_id: UUID) -> bytes:
        """The JSON of `content` for one device; a device without an envelope gets none of the others'."""
        if self.envelopes is None:
            return self.shared or b"{}"
        return self.envelopes.get(str(device_id), NO_ENVELOPE)


class CommittedEvent(msgspec.Struct, frozen=True):
    """One entry of a conversation's log, after its commit.

    `payload` is the JSON everybody shares, but without the content of the MESSAGE that `new_message` is and that
    `message_edited` holds: `render_payload` puts in what a device gets of `content`, which is None for other events.
    `message_seq` is that of the edited message, 0 for other events: who does not see that one must not see the edit.
    """

    conversation_id: UUID
    seq: int
    event: str
    payload: bytes
    content: Content | None = None
    message_seq: int = 0


class PlanRef(msgspec.Struct, frozen=True):
    """A scheduled message as it was read: it is sent only if it is still pending and this very version."""

    id: UUID
    version: int


class Draft(msgspec.Struct, frozen=True):
    """A message someone wants to send, from either door, unchecked but for its types.

    `content` is CONTENT as JSON, as the client wrote it; `signature` is raw bytes. `plan`: it was scheduled.
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
    expires_from_read: bool = False
    plan: PlanRef | None = None


class PlanStatus(StrEnum):
    """Where a scheduled message is. The first two can be changed and cancelled."""

    PENDING = "pending"
    NEEDS_REENCRYPT = "needs_reencrypt"
    SENT = "sent"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_open(self) -> bool:
        """Whether it may still be sent."""
        return self in (PlanStatus.PENDING, PlanStatus.NEEDS_REENCRYPT)


class Plan(msgspec.Struct, frozen=True):
    """A scheduled message. `draft` is what will be sent, its content empty once it was sent or cancelled.

    `failure` is the code of what keeps it from being sent, `needs` the devices that the envelopes were not for, with the
    owners of the missing ones. `version` counts its author's changes.
    """

    id: UUID
    draft: Draft
    content_sha256: bytes
    send_at: datetime
    status: PlanStatus
    failure: str | None
    needs: dict[str, Any] | None
    message_id: UUID | None
    due_at: datetime
    attempts: int
    version: int
    created_at: datetime
    updated_at: datetime


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


class GroupNews(msgspec.Struct, frozen=True):
    """Something of a group that people are told of outside it: `conversation_added`, `member_added`, `member_removed`.

    `event_id` is the same whenever the same news is told again.
    """

    event_id: UUID
    name: str
    conversation_id: UUID
    actor_id: UUID
    recipient_ids: tuple[UUID, ...]


class Announcement(msgspec.Struct, frozen=True):
    """What notification is told: of a message (`message_id` is set) or of a group."""

    event_id: UUID
    name: str
    conversation_id: UUID
    conversation_type: ConversationType
    message_id: UUID | None
    sender_id: UUID
    recipient_ids: tuple[UUID, ...]
    occurred_at: datetime


class ConversationView(msgspec.Struct, frozen=True):
    """CONVERSATION as one of its members sees it.

    `members` is None in lists of groups, where only `member_count` is told. `unread_count` stops at 1,000.
    """

    id: UUID
    type: ConversationType
    metadata: dict[str, Any]
    is_active: bool
    permissions: Permissions
    retention_seconds: int | None
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
