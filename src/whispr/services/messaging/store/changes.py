"""Changes of stored messages."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import msgspec

from whispr.kit.db import Connection
from whispr.services.messaging.store import media_links


class Tombstone(msgspec.Struct, frozen=True):
    """A message of which nothing is left but that it was."""

    conversation_id: UUID
    seq: int
    id: UUID


async def tombstone(tx: Connection, conversation_ids: Sequence[UUID], seqs: Sequence[int]) -> list[Tombstone]:
    """Take everything out of messages: content, signature, media, reactions and pins. The caller holds the conversations.

    Those that became tombstones by this, by conversation and `seq`; what was one already is left out. The digest of what
    was first sent stays, so that its sender's repeat is still known for one.
    """
    records = await tx.fetch(
        """
        WITH gone AS (
            UPDATE messages m
            SET is_deleted = true, content = '{}', content_sha256 = '', signature = '', media_ids = NULL,
                metadata = NULL, draft_sha256 = coalesce(m.draft_sha256, m.content_sha256)
            FROM unnest($1::uuid[], $2::bigint[]) AS g (conversation_id, seq)
            WHERE m.conversation_id = g.conversation_id AND m.seq = g.seq AND NOT m.is_deleted
            RETURNING m.conversation_id, m.seq, m.id
        ), unreacted AS (
            DELETE FROM message_reactions r USING gone
            WHERE r.conversation_id = gone.conversation_id AND r.message_id = gone.id
        ), unpinned AS (
            DELETE FROM message_pins p USING gone
            WHERE p.conversation_id = gone.conversation_id AND p.message_id = gone.id
        )
        SELECT conversation_id, seq, id FROM gone ORDER BY conversation_id, seq
        """,
        list(conversation_ids),
        list(seqs),
    )
    gone = [Tombstone(*record.values()) for record in records]
    if gone:
        await media_links.unlink(tx, [item.conversation_id for item in gone], [item.id for item in gone])
    return gone
