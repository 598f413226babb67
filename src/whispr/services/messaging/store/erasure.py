"""What is forgotten of a person whose account is deleted."""

from __future__ import annotations

from uuid import UUID

from whispr.kit.db import Connection


async def active_conversations(connection: Connection, user_id: UUID, limit: int) -> list[UUID]:
    """Some of the conversations the person is in."""
    records = await connection.fetch(
        "SELECT conversation_id FROM conversation_members WHERE user_id = $1 AND is_active LIMIT $2",
        user_id,
        limit,
    )
    return [record["conversation_id"] for record in records]


async def forget_person(tx: Connection, user_id: UUID) -> None:
    """Drop the person's cursors, the times of what they got and read, their settings, and what they scheduled."""
    await tx.execute("DELETE FROM scheduled_messages WHERE sender_id = $1", user_id)
    await tx.execute("DELETE FROM device_cursors WHERE user_id = $1", user_id)
    await tx.execute(
        """
        DELETE FROM receipt_marks r USING conversation_members m
        WHERE m.user_id = $1 AND r.conversation_id = m.conversation_id AND r.user_id = m.user_id
        """,
        user_id,
    )
    await tx.execute(
        "UPDATE conversation_members SET settings = '{}' WHERE user_id = $1 AND settings::text <> '{}'",
        user_id,
    )
