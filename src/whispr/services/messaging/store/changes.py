"""What becomes of a stored message: it is edited, or nothing is left of it but its place in the log."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from whispr.kit.db import Connection


async def tombstone(tx: Connection, conversation_id: UUID, message_ids: Sequence[UUID]) -> list[UUID]:
    """Erase messages of a conversation that the transaction holds; those that were not erased before, oldest first.

    Content, signature, media, reactions and pins go; media is told of it. The digest of what was first sent stays, so
    that the same draft sent again is still known to have been stored. The caller appends `message_deleted` for each.
    """
    records = await tx.fetch(
        """
        WITH gone AS (
            UPDATE messages SET
                is_deleted = true, content = '{}', content_sha256 = '', signature = '', media_ids = NULL,
                metadata = NULL, edited_device_id = NULL, draft_sha256 = coalesce(draft_sha256, content_sha256)
            WHERE conversation_id = $1 AND id = ANY($2) AND NOT is_deleted
            RETURNING id, seq
        ), unreacted AS (
            DELETE FROM message_reactions WHERE conversation_id = $1 AND message_id = ANY($2)
        ), unpinned AS (
            DELETE FROM message_pins WHERE conversation_id = $1 AND message_id = ANY($2)
        ), unpictured AS (
            DELETE FROM message_media WHERE conversation_id = $1 AND message_id = ANY($2)
            RETURNING message_id, sender_id, media_id
        ), unlinked AS (
            INSERT INTO outbox (topic, key, payload)
            SELECT 'media_unlinked', min(message_id::text), jsonb_build_object('links', jsonb_agg(jsonb_build_object(
                'message_id', message_id, 'conversation_id', $1::uuid, 'sender_id', sender_id, 'media_ids', media_ids
            )))
            FROM (
                SELECT message_id, sender_id, jsonb_agg(media_id ORDER BY media_id) AS media_ids
                FROM unpictured GROUP BY message_id, sender_id
            ) AS links
            HAVING count(*) > 0
        )
        SELECT id FROM gone ORDER BY seq
        """,
        conversation_id,
        list(message_ids),
    )
    return [record["id"] for record in records]
