"""What notification is told of: stored messages and who may be waiting for them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import msgspec

from whispr.kit.db import Connection
from whispr.services.messaging.models import ConversationType


class SentMessage(msgspec.Struct, frozen=True):
    """A message as far as a notification is concerned."""

    id: UUID
    conversation_id: UUID
    seq: int
    sender_id: UUID
    sent_at: datetime


async def sent_messages(
    connection: Connection, conversation_ids: Sequence[UUID], first: Sequence[int], last: Sequence[int]
) -> list[SentMessage]:
    """The messages of some ranges of `seq`, both ends included."""
    records = await connection.fetch(
        """
        SELECT m.id, m.conversation_id, m.seq, m.sender_id, m.sent_at
        FROM unnest($1::uuid[], $2::bigint[], $3::bigint[]) AS r (conversation_id, first_seq, last_seq)
        CROSS JOIN LATERAL (
            SELECT id, conversation_id, seq, sender_id, sent_at FROM messages
            WHERE conversation_id = r.conversation_id AND seq BETWEEN r.first_seq AND r.last_seq AND NOT is_deleted
                AND message_type <> 'system'
        ) AS m
        ORDER BY m.conversation_id, m.seq
        """,
        list(conversation_ids),
        list(first),
        list(last),
    )
    return [SentMessage(*record.values()) for record in records]


async def audience(
    connection: Connection, conversation_ids: Sequence[UUID]
) -> dict[UUID, list[tuple[UUID, int]]]:
    """By conversation: its active members, each with the `seq` above which they see events."""
    records = await connection.fetch(
        """
        SELECT conversation_id, user_id, floor_seq FROM conversation_members
        WHERE conversation_id = ANY($1) AND is_active
        """,
        list(conversation_ids),
    )
    people: dict[UUID, list[tuple[UUID, int]]] = {}
    for record in records:
        people.setdefault(record["conversation_id"], []).append((record["user_id"], record["floor_seq"]))
    return people


async def types(connection: Connection, conversation_ids: Sequence[UUID]) -> dict[UUID, ConversationType]:
    """By conversation: its type; unknown ones are left out."""
    records = await connection.fetch(
        "SELECT id, type FROM conversations WHERE id = ANY($1)", list(conversation_ids)
    )
    return {record["id"]: ConversationType(record["type"]) for record in records}
