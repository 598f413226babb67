"""Who reacted how to which message."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from uuid import UUID

import msgspec

from whispr.kit.db import Connection

Key = tuple[UUID, UUID, str]
"""Message, person, reaction."""


class Chosen(msgspec.Struct):
    """Reactions to some messages. `counts`: by message, how many people chose each. `own`: of the people asked about."""

    counts: dict[UUID, dict[str, int]]
    own: set[Key]


async def floors(
    connection: Connection, conversation_id: UUID, user_ids: Collection[UUID]
) -> dict[UUID, int]:
    """Those of the people who are active members, each with the `seq` above which they see messages."""
    records = await connection.fetch(
        """
        SELECT user_id, floor_seq FROM conversation_members
        WHERE conversation_id = $1 AND user_id = ANY($2) AND is_active
        """,
        conversation_id,
        list(user_ids),
    )
    return {record["user_id"]: record["floor_seq"] for record in records}


async def chosen(
    connection: Connection, conversation_id: UUID, message_ids: Collection[UUID], user_ids: Collection[UUID]
) -> Chosen:
    """How many chose what, and what exactly these people chose."""
    records = await connection.fetch(
        """
        SELECT message_id, reaction, count(*) AS people,
            array_agg(user_id) FILTER (WHERE user_id = ANY($3)) AS user_ids
        FROM message_reactions WHERE conversation_id = $1 AND message_id = ANY($2)
        GROUP BY message_id, reaction
        """,
        conversation_id,
        list(message_ids),
        list(user_ids),
    )
    found = Chosen({}, set())
    for record in records:
        message_id, reaction = record["message_id"], record["reaction"]
        found.counts.setdefault(message_id, {})[reaction] = record["people"]
        found.own.update((message_id, user_id, reaction) for user_id in record["user_ids"] or ())
    return found


async def change(
    tx: Connection, conversation_id: UUID, added: Mapping[Key, int], removed: Sequence[Key], now: datetime
) -> None:
    """Store reactions, each with the `seq` of its event, and remove others. No key may be in both."""
    await tx.execute(
        """
        WITH removed AS (
            DELETE FROM message_reactions r
            USING unnest($2::uuid[], $3::uuid[], $4::text[]) AS gone (message_id, user_id, reaction)
            WHERE r.conversation_id = $1 AND r.message_id = gone.message_id AND r.user_id = gone.user_id
                AND r.reaction = gone.reaction
        )
        INSERT INTO message_reactions (conversation_id, message_id, user_id, reaction, seq, created_at)
        SELECT $1, n.message_id, n.user_id, n.reaction, n.seq, $9
        FROM unnest($5::uuid[], $6::uuid[], $7::text[], $8::bigint[]) AS n (message_id, user_id, reaction, seq)
        ON CONFLICT (conversation_id, message_id, user_id, reaction) DO UPDATE SET
            seq = excluded.seq, created_at = excluded.created_at
        """,
        conversation_id,
        [message_id for message_id, _, _ in removed],
        [user_id for _, user_id, _ in removed],
        [reaction for _, _, reaction in removed],
        [message_id for message_id, _, _ in added],
        [user_id for _, user_id, _ in added],
        [reaction for _, _, reaction in added],
        list(added.values()),
        now,
    )
