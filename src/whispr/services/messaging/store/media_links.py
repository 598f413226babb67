"""Which messages refer to which media."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from whispr.kit.db import Connection


async def may_see(
    connection: Connection, media_id: UUID, owner_id: UUID, user_id: UUID, now: datetime
) -> bool:
    """Whether the owner sent the medium in a message that the person can read at this moment."""
    seen: bool = await connection.fetchval(
        """
        SELECT EXISTS (
            SELECT FROM message_media l
            JOIN conversation_members m
              ON m.conversation_id = l.conversation_id AND m.user_id = $3 AND m.is_active AND m.floor_seq < l.seq
            JOIN conversations c ON c.id = l.conversation_id AND c.purged_seq < l.seq
            JOIN messages g ON g.conversation_id = l.conversation_id AND g.seq = l.seq
            WHERE l.media_id = $1 AND l.sender_id = $2
              AND NOT g.is_deleted AND (g.expires_at IS NULL OR g.expires_at > $4)
        )
        """,
        media_id,
        owner_id,
        user_id,
        now,
    )
    return seen
