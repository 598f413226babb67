"""What is kept of one person, page by page."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from whispr.kit.db import Connection


class Membership(msgspec.Struct, frozen=True, tag="membership"):
    """The person's part in a conversation, the ones they have left included. They see events above `floor_seq`."""

    conversation_id: UUID
    role: str
    settings: dict[str, Any]
    joined_at: datetime
    left_at: datetime | None
    floor_seq: int
    delivered_seq: int
    read_seq: int


class Pin(msgspec.Struct, frozen=True, tag="pin"):
    """A pinned message that the person can see."""

    conversation_id: UUID
    message_id: UUID
    pinned_by: UUID
    pinned_at: datetime


class ScheduledMessage(msgspec.Struct, frozen=True, tag="scheduled_message"):
    """A message of the person's that waits for its time, or waited. Its content is asked for where it is shown."""

    id: UUID
    conversation_id: UUID
    client_id: UUID
    message_type: str
    send_at: datetime
    status: str
    message_id: UUID | None
    created_at: datetime
    updated_at: datetime


class Report(msgspec.Struct, frozen=True, tag="report"):
    """What the person reported; what they revealed with it is base64."""

    id: UUID
    message_id: UUID
    reason: str
    comment: str | None
    plaintext: bytes | None
    is_verified: bool
    created_at: datetime


class Restriction(msgspec.Struct, frozen=True, tag="restriction"):
    """A limit on what the person may send."""

    reason: str
    until: datetime
    created_at: datetime


class Cursor(msgspec.Struct, frozen=True, tag="device_cursor"):
    """How far one of the person's devices has got."""

    device_id: UUID
    conversation_id: UUID
    delivered_seq: int
    updated_at: datetime


async def memberships(connection: Connection, user_id: UUID, after: UUID, limit: int) -> list[Membership]:
    """The next memberships after a conversation, by its id."""
    records = await connection.fetch(
        """
        SELECT conversation_id, role, settings, joined_at, left_at, floor_seq, delivered_seq, read_seq
        FROM conversation_members WHERE user_id = $1 AND conversation_id > $2 ORDER BY conversation_id LIMIT $3
        """,
        user_id,
        after,
        limit,
    )
    return [Membership(*record.values()) for record in records]


async def pins(connection: Connection, conversation_id: UUID, user_id: UUID) -> list[Pin]:
    """The pins of a conversation that an active member can see; there are never many."""
    records = await connection.fetch(
        """
        SELECT p.conversation_id, p.message_id, p.pinned_by, p.pinned_at
        FROM message_pins p
        JOIN conversation_members m ON m.conversation_id = p.conversation_id AND m.user_id = $2 AND m.is_active
        JOIN messages g ON g.conversation_id = p.conversation_id AND g.id = p.message_id AND g.seq > m.floor_seq
        WHERE p.conversation_id = $1 ORDER BY p.pinned_at, p.message_id
        """,
        conversation_id,
        user_id,
    )
    return [Pin(*record.values()) for record in records]


async def scheduled_messages(
    connection: Connection, user_id: UUID, after: UUID, limit: int
) -> list[ScheduledMessage]:
    """The next scheduled messages of the person after one, by id."""
    records = await connection.fetch(
        """
        SELECT id, conversation_id, client_id, message_type, send_at, status, message_id, created_at, updated_at
        FROM scheduled_messages WHERE sender_id = $1 AND id > $2 ORDER BY id LIMIT $3
        """,
        user_id,
        after,
        limit,
    )
    return [ScheduledMessage(*record.values()) for record in records]


async def reports(connection: Connection, user_id: UUID, after: UUID, limit: int) -> list[Report]:
    """The next reports by the person after one, by id."""
    records = await connection.fetch(
        """
        SELECT id, message_id, reason, comment, plaintext, is_verified, created_at
        FROM message_reports WHERE reporter_id = $1 AND id > $2 ORDER BY id LIMIT $3
        """,
        user_id,
        after,
        limit,
    )
    return [Report(*record.values()) for record in records]


async def restriction(connection: Connection, user_id: UUID) -> Restriction | None:
    """The limit the person is under."""
    record = await connection.fetchrow(
        "SELECT reason, until, created_at FROM sender_restrictions WHERE user_id = $1", user_id
    )
    return Restriction(*record.values()) if record else None


async def cursors(
    connection: Connection, user_id: UUID, after: tuple[UUID, UUID], limit: int
) -> list[Cursor]:
    """The next cursors of the person's devices after one, by device and conversation."""
    records = await connection.fetch(
        """
        SELECT device_id, conversation_id, delivered_seq, updated_at FROM device_cursors
        WHERE user_id = $1 AND (device_id, conversation_id) > ($2, $3)
        ORDER BY device_id, conversation_id LIMIT $4
        """,
        user_id,
        *after,
        limit,
    )
    return [Cursor(*record.values()) for record in records]
