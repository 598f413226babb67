"""CONVERSATION as its members see it, with unread count and last message.

Messages of type `system` are between clients, such as the keys of a group: nobody is shown or told of one.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.messaging.models import (
    ConversationType,
    ConversationView,
    MemberView,
    Permissions,
    Role,
)
from whispr.services.messaging.store.history import MESSAGE_COLUMNS, message_columns, message_from

UNREAD_LIMIT = 1_000

_MESSAGE_NAMES = (*(name.strip() for name in MESSAGE_COLUMNS.split(",")), "reactions")
_MESSAGE = ", ".join(f"last.{name} AS message_{name}" for name in _MESSAGE_NAMES)

_VIEW = f"""
    SELECT c.id, c.type, c.metadata, c.is_active, c.created_by, c.created_at, c.updated_at, c.last_seq,
           c.permissions, c.retention_seconds,
           m.role, m.settings, m.delivered_seq, m.read_seq,
           (SELECT count(*) FROM (
                SELECT FROM messages u
                WHERE u.conversation_id = c.id AND u.seq > GREATEST(m.read_seq, m.floor_seq, c.purged_seq)
                  AND u.sender_id <> m.user_id AND NOT u.is_deleted AND u.message_type <> 'system'
                LIMIT {UNREAD_LIMIT}
           ) AS unread) AS unread_count,
           (SELECT count(*) FROM conversation_members o WHERE o.conversation_id = c.id AND o.is_active) AS member_count,
           {_MESSAGE}
    FROM conversation_members m
    JOIN conversations c ON c.id = m.conversation_id
    LEFT JOIN LATERAL (
        SELECT {message_columns("l")} FROM messages l
        WHERE l.conversation_id = c.id AND l.seq > GREATEST(m.floor_seq, c.purged_seq) AND l.message_type <> 'system'
        ORDER BY l.seq DESC LIMIT 1
    ) AS last ON true
"""


def _view(record: Any, members: list[MemberView] | None) -> ConversationView:
    last = None
    if record["message_id"] is not None:
        last = message_from({name: record[f"message_{name}"] for name in _MESSAGE_NAMES})
    conversation_type = ConversationType(record["type"])
    return ConversationView(
        id=record["id"],
        type=conversation_type,
        metadata=record["metadata"],
        is_active=record["is_active"],
        permissions=Permissions.of(conversation_type, record["permissions"]),
        retention_seconds=record["retention_seconds"],
        created_by=record["created_by"],
        created_at=record["created_at"],
        updated_at=record["updated_at"],
        head_seq=record["last_seq"],
        role=Role(record["role"]),
        settings=record["settings"],
        delivered_seq=record["delivered_seq"],
        read_seq=record["read_seq"],
        unread_count=record["unread_count"],
        member_count=record["member_count"],
        members=members,
        last_message=last,
    )


async def view(connection: Connection, conversation_id: UUID, user_id: UUID) -> ConversationView | None:
    """One conversation as an active member sees it, all members included."""
    record = await connection.fetchrow(
        f"{_VIEW} WHERE m.conversation_id = $1 AND m.user_id = $2 AND m.is_active", conversation_id, user_id
    )
    if record is None:
        return None
    members = await _members(connection, [conversation_id])
    return _view(record, members.get(conversation_id, []))


async def list_views(
    connection: Connection, user_id: UUID, before: tuple[datetime, UUID] | None, limit: int
) -> list[ConversationView]:
    """A person's conversations, latest activity first, from the one before `before`. Groups come without members."""
    at, before_id = before if before is not None else (None, None)
    records = await connection.fetch(
        f"""
        {_VIEW}
        WHERE m.user_id = $1 AND m.is_active AND (m.hidden_seq IS NULL OR c.last_seq > m.hidden_seq)
          AND ($2::timestamptz IS NULL OR (c.updated_at, c.id) < ($2, $3))
        ORDER BY c.updated_at DESC, c.id DESC LIMIT $4
        """,
        user_id,
        at,
        before_id,
        limit,
    )
    direct = [record["id"] for record in records if record["type"] == ConversationType.DIRECT]
    members = await _members(connection, direct)
    return [_view(record, members.get(record["id"])) for record in records]


async def _members(connection: Connection, conversation_ids: list[UUID]) -> dict[UUID, list[MemberView]]:
    records = await connection.fetch(
        """
        SELECT conversation_id, user_id, role, joined_at, delivered_seq, read_seq FROM conversation_members
        WHERE conversation_id = ANY($1) AND is_active ORDER BY conversation_id, joined_at, floor_seq, user_id
        """,
        conversation_ids,
    )
    members: dict[UUID, list[MemberView]] = {}
    for record in records:
        members.setdefault(record["conversation_id"], []).append(
            MemberView(
                record["user_id"],
                Role(record["role"]),
                record["joined_at"],
                record["delivered_seq"],
                record["read_seq"],
            )
        )
    return members
