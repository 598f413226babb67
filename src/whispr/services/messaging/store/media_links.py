"""Which messages refer to which media, and what media is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from whispr.kit.db import Connection


async def unlink(tx: Connection, conversation_ids: Sequence[UUID], message_ids: Sequence[UUID]) -> None:
    """Forget the media of messages that are gone, and write for media that they are not referred to any more."""
    await tx.execute(
        """
        WITH gone AS (
            DELETE FROM message_media l
            USING unnest($1::uuid[], $2::uuid[]) AS g (conversation_id, message_id)
            WHERE l.conversation_id = g.conversation_id AND l.message_id = g.message_id
            RETURNING l.*
        ), message AS (
            SELECT conversation_id, message_id, sender_id, jsonb_agg(media_id) AS media_ids
            FROM gone GROUP BY conversation_id, message_id, sender_id
        )
        INSERT INTO outbox (topic, key, payload)
        SELECT 'media_unlinked', min(message_id::text), jsonb_build_object('links', jsonb_agg(to_jsonb(message)))
        FROM message HAVING count(*) > 0
        """,
        list(conversation_ids),
        list(message_ids),
    )


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
