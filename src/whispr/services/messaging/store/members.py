"""Who is in a conversation, in which role, and since which event."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.messaging.models import (
    Conversation,
    ConversationType,
    Member,
    MemberRow,
    Permissions,
    Role,
)

_COLUMNS = (
    "conversation_id, user_id, role, settings, joined_at, floor_seq, is_active, delivered_seq, read_seq"
)
_FLOOR = "GREATEST(floor_seq, (SELECT purged_seq FROM conversations c WHERE c.id = m.conversation_id)) AS floor_seq"


def _row(record: Any) -> MemberRow:
    return MemberRow(
        conversation_id=record["conversation_id"],
        user_id=record["user_id"],
        role=Role(record["role"]),
        settings=record["settings"],
        joined_at=record["joined_at"],
        floor_seq=record["floor_seq"],
        is_active=record["is_active"],
        delivered_seq=record["delivered_seq"],
        read_seq=record["read_seq"],
    )


async def load_conversations(
    connection: Connection, conversation_ids: Sequence[UUID]
) -> dict[UUID, Conversation]:
    """Conversations with their active members, as the hot path needs them, in one snapshot; those that exist."""
    records = await connection.fetch(
        """
        SELECT c.id, c.type, c.is_active, c.permissions, m.user_id, m.role,
               GREATEST(m.floor_seq, c.purged_seq) AS floor_seq
        FROM conversations c
        LEFT JOIN conversation_members m ON m.conversation_id = c.id AND m.is_active
        WHERE c.id = ANY($1::uuid[])
        """,
        list(conversation_ids),
    )
    found: dict[UUID, Conversation] = {}
    for record in records:
        conversation = found.get(record["id"])
        if conversation is None:
            conversation = found[record["id"]] = _conversation(record)
        if record["user_id"] is not None:
            conversation.members[record["user_id"]] = Member(Role(record["role"]), record["floor_seq"])
    return found


def _conversation(record: Any) -> Conversation:
    conversation_type = ConversationType(record["type"])
    return Conversation(
        id=record["id"],
        type=conversation_type,
        is_active=record["is_active"],
        permissions=Permissions.of(conversation_type, record["permissions"]),
        members={},
    )


async def find_active(connection: Connection, conversation_id: UUID, user_id: UUID) -> MemberRow | None:
    """One active member. Their floor is at least where the conversation is purged to."""
    record = await connection.fetchrow(
        f"""
        SELECT {_COLUMNS.replace("floor_seq", _FLOOR)} FROM conversation_members m
        WHERE conversation_id = $1 AND user_id = $2 AND is_active
        """,
        conversation_id,
        user_id,
    )
    return _row(record) if record else None


async def list_active(connection: Connection, conversation_ids: Sequence[UUID]) -> list[MemberRow]:
    """All active members, longest in first."""
    records = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM conversation_members
        WHERE conversation_id = ANY($1) AND is_active
        ORDER BY conversation_id, joined_at, floor_seq, user_id
        """,
        list(conversation_ids),
    )
    return [_row(record) for record in records]


async def active_ids(connection: Connection, conversation_id: UUID) -> list[UUID]:
    """The ids of all active members."""
    records = await connection.fetch(
        "SELECT user_id FROM conversation_members WHERE conversation_id = $1 AND is_active", conversation_id
    )
    return [record["user_id"] for record in records]


async def insert_founders(
    tx: Connection, conversation_id: UUID, roles: Sequence[tuple[UUID, Role]], now: datetime
) -> None:
    """The members a conversation is created with. They see everything in it."""
    await tx.execute(
        """
        INSERT INTO conversation_members (conversation_id, user_id, role, joined_at)
        SELECT $1, m.user_id, m.role, $4 FROM unnest($2::uuid[], $3::text[]) AS m (user_id, role)
        """,
        conversation_id,
        [user_id for user_id, _ in roles],
        [role.value for _, role in roles],
        now,
    )


async def join(
    tx: Connection,
    conversation_id: UUID,
    user_ids: Sequence[UUID],
    role: Role,
    floors: Sequence[int],
    now: datetime,
) -> None:
    """People who come later, or come back: each sees events above their floor and has nothing unread below it."""
    await tx.execute(
        """
        INSERT INTO conversation_members AS m
            (conversation_id, user_id, role, joined_at, floor_seq, delivered_seq, read_seq)
        SELECT $1, n.user_id, $3, $5, n.floor_seq, n.floor_seq, n.floor_seq
        FROM unnest($2::uuid[], $4::bigint[]) AS n (user_id, floor_seq)
        ON CONFLICT (conversation_id, user_id) DO UPDATE SET
            role = excluded.role, settings = '{}', joined_at = excluded.joined_at, floor_seq = excluded.floor_seq,
            is_active = true, left_at = NULL, left_seq = NULL, hidden_seq = NULL,
            delivered_seq = GREATEST(m.delivered_seq, excluded.delivered_seq),
            read_seq = GREATEST(m.read_seq, excluded.read_seq)
        WHERE NOT m.is_active
        """,
        conversation_id,
        list(user_ids),
        role.value,
        list(floors),
        now,
    )


async def acquainted(connection: Connection, user_id: UUID) -> set[UUID]:
    """Everybody else who is in a conversation with `user_id`."""
    records = await connection.fetch(
        """
        SELECT DISTINCT other.user_id
        FROM conversation_members own
        JOIN conversation_members other ON other.conversation_id = own.conversation_id AND other.is_active
        WHERE own.user_id = $1 AND own.is_active AND other.user_id <> $1
        """,
        user_id,
    )
    return {record["user_id"] for record in records}


async def leave(tx: Connection, conversation_id: UUID, user_id: UUID, left_seq: int, now: datetime) -> None:
    """End a membership with the event that tells of it."""
    await tx.execute(
        """
        UPDATE conversation_members SET is_active = false, left_at = $4, left_seq = $3
        WHERE conversation_id = $1 AND user_id = $2 AND is_active
        """,
        conversation_id,
        user_id,
        left_seq,
        now,
    )


async def set_role(tx: Connection, conversation_id: UUID, user_id: UUID, role: Role) -> None:
    """Give an active member a role."""
    await tx.execute(
        "UPDATE conversation_members SET role = $3 WHERE conversation_id = $1 AND user_id = $2 AND is_active",
        conversation_id,
        user_id,
        role.value,
    )


async def set_settings(
    connection: Connection, conversation_id: UUID, user_id: UUID, settings: dict[str, Any]
) -> None:
    """Replace a member's own settings of the conversation."""
    await connection.execute(
        "UPDATE conversation_members SET settings = $3 WHERE conversation_id = $1 AND user_id = $2 AND is_active",
        conversation_id,
        user_id,
        settings,
    )


async def hide(tx: Connection, conversation_id: UUID, user_id: UUID, seq: int) -> None:
    """Leave the conversation out of the person's list until something newer than `seq` happens in it."""
    await tx.execute(
        "UPDATE conversation_members SET hidden_seq = $3 WHERE conversation_id = $1 AND user_id = $2 AND is_active",
        conversation_id,
        user_id,
        seq,
    )


async def unhide(tx: Connection, conversation_id: UUID, user_id: UUID) -> None:
    """Show the conversation in the person's list again."""
    await tx.execute(
        """
        UPDATE conversation_members SET hidden_seq = NULL
        WHERE conversation_id = $1 AND user_id = $2 AND hidden_seq IS NOT NULL
        """,
        conversation_id,
        user_id,
    )
