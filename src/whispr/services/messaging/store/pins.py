"""Which messages are pinned in a conversation."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.messaging.models import Pin
from whispr.services.messaging.store.history import message_columns, message_from


async def is_pinned(connection: Connection, conversation_id: UUID, message_id: UUID) -> bool:
    """Whether the message is pinned."""
    found: bool = await connection.fetchval(
        "SELECT EXISTS (SELECT FROM message_pins WHERE conversation_id = $1 AND message_id = $2)",
        conversation_id,
        message_id,
    )
    return found


async def count(connection: Connection, conversation_id: UUID) -> int:
    """How many messages are pinned."""
    number: int = await connection.fetchval(
        "SELECT count(*) FROM message_pins WHERE conversation_id = $1", conversation_id
    )
    return number


async def insert(tx: Connection, conversation_id: UUID, message_id: UUID, by: UUID, now: datetime) -> None:
    """Pin a message that is not pinned."""
    await tx.execute(
        "INSERT INTO message_pins (conversation_id, message_id, pinned_by, pinned_at) VALUES ($1, $2, $3, $4)",
        conversation_id,
        message_id,
        by,
        now,
    )


async def delete(tx: Connection, conversation_id: UUID, message_id: UUID) -> bool:
    """Unpin a message; whether it was pinned."""
    gone: bool | None = await tx.fetchval(
        "DELETE FROM message_pins WHERE conversation_id = $1 AND message_id = $2 RETURNING true",
        conversation_id,
        message_id,
    )
    return gone is not None


async def list_page(
    connection: Connection,
    conversation_id: UUID,
    user_id: UUID,
    before: tuple[datetime, UUID] | None,
    limit: int,
) -> list[Pin]:
    """Pins that an active member may see, the latest first, from the one before `before`."""
    at, before_id = before if before is not None else (None, None)
    records = await connection.fetch(
        f"""
        SELECT p.pinned_by, p.pinned_at, m.* FROM message_pins p
        JOIN conversations c ON c.id = p.conversation_id
        JOIN conversation_members v
            ON v.conversation_id = p.conversation_id AND v.user_id = $2 AND v.is_active
        CROSS JOIN LATERAL (
            SELECT {message_columns("messages")} FROM messages
            WHERE messages.conversation_id = p.conversation_id AND messages.id = p.message_id
                AND seq > GREATEST(v.floor_seq, c.purged_seq)
        ) AS m
        WHERE p.conversation_id = $1 AND ($3::timestamptz IS NULL OR (p.pinned_at, p.message_id) < ($3, $4))
        ORDER BY p.pinned_at DESC, p.message_id DESC LIMIT $5
        """,
        conversation_id,
        user_id,
        at,
        before_id,
        limit,
    )
    return [Pin(message_from(record), record["pinned_by"], record["pinned_at"]) for record in records]
