"""What becomes of a stored message: it is edited, or nothing is left of it but its place in the log."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from whispr.kit.db import Connection
from whispr.services.messaging.models import Message
from whispr.services.messaging.store.history import message_columns, message_from


class Target(msgspec.Struct, frozen=True):
    """A message as far as changing it is concerned."""

    id: UUID
    seq: int
    sender_id: UUID
    content_sha256: bytes
    signature: bytes
    is_deleted: bool
    expires_at: datetime | None


async def find_place(connection: Connection, message_id: UUID) -> UUID | None:
    """The conversation a message is in."""
    place: UUID | None = await connection.fetchval(
        "SELECT conversation_id FROM messages WHERE id = $1", message_id
    )
    return place


async def targets(
    connection: Connection, conversation_id: UUID, message_ids: Sequence[UUID]
) -> dict[UUID, Target]:
    """Those of the messages that are in the conversation."""
    records = await connection.fetch(
        """
        SELECT id, seq, sender_id, content_sha256, signature, is_deleted, expires_at FROM messages
        WHERE conversation_id = $1 AND id = ANY($2)
        """,
        conversation_id,
        list(message_ids),
    )
    return {record["id"]: Target(*record.values()) for record in records}


async def edit(
    tx: Connection,
    conversation_id: UUID,
    message_id: UUID,
    device_id: UUID,
    content: bytes,
    content_sha256: bytes,
    signature: bytes,
    now: datetime,
) -> Message:
    """Put new content, signed by `device_id`, in place of a message's. The digest of the first one stays beside it."""
    record: Any = await tx.fetchrow(
        f"""
        UPDATE messages SET
            content = $4, content_sha256 = $5, signature = $6, edited_at = $7,
            edited_device_id = NULLIF($3, sender_device_id), draft_sha256 = coalesce(draft_sha256, content_sha256)
        WHERE conversation_id = $1 AND id = $2
        RETURNING {message_columns("messages")}
        """,
        conversation_id,
        message_id,
        device_id,
        content,
        content_sha256,
        signature,
        now,
    )
    return message_from(record)


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
