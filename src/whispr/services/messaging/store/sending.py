"""Messages go in: the one statement that numbers and stores a batch, and what its retries look up."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from enum import IntEnum
from typing import Final
from uuid import UUID

import msgspec

from whispr.kit.db import Connection
from whispr.services.messaging.models import Message, PlanRef
from whispr.services.messaging.store.history import message_columns, message_from

PLANNER: Final = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}
"""Server settings for connections that run `store_batch`.

Tables grow from empty faster than autovacuum analyses them. A plan made while they were small would read them whole
for every message until somebody noticed.
"""


class Outcome(IntEnum):
    """What the database made of one message of a batch."""

    STORED = 0
    DUPLICATE = 1
    CONFLICT = 2
    NOT_A_MEMBER = 3
    CLOSED = 4
    STALE = 5
    """Someone else wrote to the conversation while the batch waited for it; store it again, locked first."""
    NOT_ALLOWED = 6
    RESCHEDULED = 7
    """A scheduled message that was changed, cancelled or sent since it was read."""


class NewMessage(msgspec.Struct, frozen=True, gc=False):
    """A checked message to be stored. `id` is ours; it tells our own earlier attempt from the client's."""

    id: UUID
    conversation_id: UUID
    sender_id: UUID
    sender_device_id: UUID
    client_id: UUID
    message_type: str
    content: bytes
    content_sha256: bytes
    signature: bytes
    reply_to_id: UUID | None
    media_ids: tuple[UUID, ...]
    expires_in: int | None
    expires_from_read: bool
    plan: PlanRef | None


class Stored(msgspec.Struct, frozen=True, gc=False):
    """The answer for one message. `id`, `seq` and `sent_at` are those of the stored message, if there is one."""

    outcome: Outcome
    id: UUID
    seq: int
    sent_at: datetime


async def lock_conversations(tx: Connection, conversation_ids: Collection[UUID], *, timeout: float) -> None:
    """Lock the rows in id order, so that two nodes never wait for each other. `timeout` is in seconds."""
    await tx.fetch(
        "SELECT 1 FROM conversations WHERE id = ANY($1) ORDER BY id FOR UPDATE",
        list(conversation_ids),
        timeout=timeout,
    )


async def store_batch(
    connection: Connection, messages: Sequence[NewMessage], sent_at: datetime, *, timeout: float
) -> list[Stored]:
    """Number and store a batch; one answer per message, in order. `timeout` is in seconds.

    No two messages of a batch may share (conversation, device, client_id). In autocommit it is its own transaction.

    Everything is judged by the statement's snapshot, taken before it waits for the row locks, so a conversation whose
    `last_seq` moved meanwhile is answered STALE and left alone. Every change of membership moves `last_seq` too.
    Scheduled messages are looked at after they are locked, and are marked as sent by the same statement that sends them.
    """
    planned = [(message.id, message.plan) for message in messages if message.plan is not None]
    columns = tuple(
        zip(
            *(
                (
                    message.conversation_id,
                    message.id,
                    message.sender_id,
                    message.sender_device_id,
                    message.client_id,
                    message.message_type,
                    message.content,
                    message.content_sha256,
                    message.signature,
                    message.reply_to_id,
                    _uuid_array(message.media_ids),
                    message.expires_in,
                    message.expires_from_read,
                )
                for message in messages
            ),
            strict=True,
        )
    )
    rows = await connection.fetch(
        _STORE_BATCH,
        *columns,
        sorted({message.conversation_id for message in messages}),
        sent_at,
        [message_id for message_id, _ in planned],
        [plan.id for _, plan in planned],
        [plan.version for _, plan in planned],
        timeout=timeout,
    )
    return [Stored(_OUTCOMES[row[0]], row[1], row[2], row[3]) for row in rows]


_OUTCOMES: Final = tuple(Outcome)

# What grows is looked up LATERAL with a LIMIT, so that it can only be one index lookup per message (in one partition);
# what is made here is carried along or hashed, never joined row by row with itself.
_STORE_BATCH = """
WITH draft AS MATERIALIZED (
    SELECT * FROM unnest(
        $1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::uuid[], $6::text[], $7::bytea[], $8::bytea[], $9::bytea[],
        $10::uuid[], $11::text[], $12::int[], $13::boolean[]
    ) WITH ORDINALITY AS d (
        conversation_id, id, sender_id, sender_device_id, client_id, message_type, content, content_sha256, signature,
        reply_to_id, media_ids, expires_in, expires_from_read, ord
    )
), locked AS MATERIALIZED (
    SELECT id, last_seq, is_active, permissions FROM conversations WHERE id = ANY($14::uuid[]) ORDER BY id FOR UPDATE
), room AS MATERIALIZED (
    SELECT id, last_seq, is_active, permissions ->> 'send' AS send_role,
        last_seq = (SELECT seen.last_seq FROM conversations seen WHERE seen.id = locked.id) AS is_current
    FROM locked
), planned AS MATERIALIZED (
    -- Conversations first, as everybody locks them. Whoever changes or cancels one meanwhile has won.
    SELECT s.id, p.message_id
    FROM unnest($16::uuid[], $17::uuid[], $18::int[]) AS p (message_id, id, version)
    JOIN scheduled_messages s ON s.id = p.id AND s.version = p.version AND s.status = 'pending'
    WHERE (SELECT count(*) FROM locked) > 0
    FOR UPDATE OF s
), numbered AS MATERIALIZED (
    SELECT judged.*,
        last_seq + count(*) FILTER (WHERE outcome = 0) OVER (PARTITION BY conversation_id ORDER BY ord) AS seq
    FROM (
        SELECT d.*, room.last_seq,
            earlier.id AS earlier_id, earlier.seq AS earlier_seq, earlier.sent_at AS earlier_sent_at,
            CASE
                WHEN earlier.id IS NOT NULL THEN CASE WHEN earlier.draft_sha256 = d.content_sha256 THEN 1 ELSE 2 END
                WHEN room.id IS NULL THEN 3
                WHEN room.is_current IS NOT TRUE THEN 5
                WHEN member.is_active IS NOT TRUE THEN 3
                WHEN NOT room.is_active THEN 4
                WHEN room.send_role <> 'member' AND member.role <> 'owner' AND member.role <> room.send_role THEN 6
                WHEN d.id = ANY ($16::uuid[]) AND d.id NOT IN (SELECT message_id FROM planned) THEN 7
                ELSE 0
            END AS outcome
        FROM draft d
        LEFT JOIN room ON room.id = d.conversation_id
        LEFT JOIN LATERAL (
            -- is_active is judged outside: inside it would invite the index by user, a walk through all of a person's
            -- conversations.
            SELECT m.is_active, m.role FROM conversation_members m
            WHERE m.conversation_id = d.conversation_id AND m.user_id = d.sender_id
            LIMIT 1
        ) member ON true
        LEFT JOIN LATERAL (
            SELECT e.id, e.seq, e.sent_at, coalesce(e.draft_sha256, e.content_sha256) AS draft_sha256 FROM messages e
            WHERE e.conversation_id = d.conversation_id AND e.sender_device_id = d.sender_device_id
                AND e.client_id = d.client_id
            LIMIT 1
        ) earlier ON true
    ) judged
), span AS MATERIALIZED (
    SELECT conversation_id, min(seq) AS first_seq, max(seq) AS last_seq
    FROM numbered WHERE outcome = 0 GROUP BY conversation_id
), stored AS (
    INSERT INTO messages (
        conversation_id, seq, id, sender_id, sender_device_id, client_id, message_type, content, content_sha256,
        signature, reply_to_id, media_ids, expires_in, expires_from_read, expires_at, sent_at
    )
    SELECT conversation_id, seq, id, sender_id, sender_device_id, client_id, message_type, content, content_sha256,
        signature, reply_to_id, media_ids::uuid[], expires_in, expires_from_read,
        CASE WHEN NOT expires_from_read THEN $15::timestamptz + make_interval(secs => expires_in) END, $15
    FROM numbered WHERE outcome = 0
), moved AS (
    UPDATE conversations c SET last_seq = span.last_seq, updated_at = $15 FROM span WHERE c.id = span.conversation_id
), announced AS (
    -- One row for the whole batch: a row per message would cost as much as the message itself.
    INSERT INTO outbox (topic, key, payload)
    SELECT 'message_sent', (SELECT id::text FROM numbered WHERE outcome = 0 ORDER BY ord LIMIT 1),
        jsonb_build_object('ranges', jsonb_agg(jsonb_build_object(
            'conversation_id', conversation_id, 'first_seq', first_seq, 'last_seq', last_seq
        )))
    FROM span HAVING count(*) > 0
), fired AS (
    UPDATE scheduled_messages s
    SET status = 'sent', failure = NULL, message_id = planned.message_id, content = '', signature = '', updated_at = $15
    FROM planned JOIN numbered ON numbered.id = planned.message_id AND numbered.outcome = 0
    WHERE s.id = planned.id AND cardinality($16::uuid[]) > 0
), pictured AS (
    INSERT INTO message_media (media_id, conversation_id, message_id, sender_id, seq)
    SELECT unnest(media_ids::uuid[]), conversation_id, id, sender_id, seq
    FROM numbered WHERE outcome = 0 AND media_ids IS NOT NULL
    ON CONFLICT DO NOTHING
), linked AS (
    INSERT INTO outbox (topic, key, payload)
    SELECT 'media_linked', min(id::text), jsonb_build_object('links', jsonb_agg(jsonb_build_object(
        'message_id', id, 'conversation_id', conversation_id, 'sender_id', sender_id, 'media_ids', media_ids::uuid[]
    )))
    FROM numbered WHERE outcome = 0 AND media_ids IS NOT NULL HAVING count(*) > 0
)
SELECT outcome, coalesce(earlier_id, id), coalesce(earlier_seq, seq, 0), coalesce(earlier_sent_at, $15)
FROM numbered ORDER BY ord
"""


async def locate_messages(
    connection: Connection, message_ids: Collection[UUID]
) -> dict[UUID, tuple[UUID, int]]:
    """Conversation and `seq` of the messages that exist, by id."""
    records = await connection.fetch(
        "SELECT id, conversation_id, seq FROM messages WHERE id = ANY($1)", list(message_ids)
    )
    return {record["id"]: (record["conversation_id"], record["seq"]) for record in records}


async def find_sent(
    connection: Connection, conversation_id: UUID, sender_device_id: UUID, client_id: UUID
) -> tuple[Message, bytes] | None:
    """The stored message with this client id, in its present state, and the digest of what was first sent under it."""
    record = await connection.fetchrow(
        f"SELECT {message_columns('messages')}, coalesce(draft_sha256, content_sha256) AS first_sha256 FROM messages WHERE conversation_id = $1 AND sender_device_id = $2 AND client_id = $3",
        conversation_id,
        sender_device_id,
        client_id,
    )
    return None if record is None else (message_from(record), record["first_sha256"])


def _uuid_array(ids: Sequence[UUID]) -> str | None:
    # Arrays of arrays must be rectangular in PostgreSQL, so each list travels as text.
    return "{" + ",".join(map(str, ids)) + "}" if ids else None
