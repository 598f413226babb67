"""Watermarks: how far each person and each device has got."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.messaging.models import Watermark


async def advance(
    tx: Connection,
    conversation_ids: Sequence[UUID],
    user_ids: Sequence[UUID],
    delivered: Sequence[int],
    read: Sequence[int],
    now: datetime,
) -> list[Watermark]:
    """Move people's watermarks forward, never back and never past the head; the ones that moved.

    Each pair of conversation and person comes once. Rows are locked in one order, so that two nodes cannot wait for each
    other; the moves are kept in `receipt_marks`, from which the times of single messages are read.
    """
    records = await tx.fetch(
        """
        WITH asked AS (
            SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::bigint[])
                AS a (conversation_id, user_id, delivered_seq, read_seq)
        ), held AS MATERIALIZED (
            SELECT m.conversation_id, m.user_id, m.delivered_seq, m.read_seq,
                   GREATEST(m.delivered_seq, LEAST(a.delivered_seq, c.last_seq)) AS new_delivered,
                   GREATEST(m.read_seq, LEAST(a.read_seq, c.last_seq)) AS new_read
            FROM conversation_members m
            JOIN asked a USING (conversation_id, user_id)
            JOIN conversations c ON c.id = m.conversation_id
            WHERE m.is_active
            ORDER BY m.conversation_id, m.user_id
            FOR UPDATE OF m
        ), moved AS (
            UPDATE conversation_members m SET delivered_seq = h.new_delivered, read_seq = h.new_read
            FROM held h
            WHERE m.conversation_id = h.conversation_id AND m.user_id = h.user_id
              AND (h.new_delivered > h.delivered_seq OR h.new_read > h.read_seq)
            RETURNING m.conversation_id, m.user_id, h.delivered_seq AS old_delivered, h.read_seq AS old_read,
                      m.delivered_seq, m.read_seq
        ), marked AS (
            INSERT INTO receipt_marks (conversation_id, user_id, kind, seq, at)
            SELECT conversation_id, user_id, 1, delivered_seq, $5::timestamptz FROM moved WHERE delivered_seq > old_delivered
            UNION ALL
            SELECT conversation_id, user_id, 2, read_seq, $5::timestamptz FROM moved WHERE read_seq > old_read
            ON CONFLICT DO NOTHING
        )
        SELECT * FROM moved
        """,
        list(conversation_ids),
        list(user_ids),
        list(delivered),
        list(read),
        now,
    )
    return [
        Watermark(
            conversation_id=record["conversation_id"],
            user_id=record["user_id"],
            delivered_seq=record["delivered_seq"],
            read_seq=record["read_seq"],
            previous_delivered_seq=record["old_delivered"],
            previous_read_seq=record["old_read"],
        )
        for record in records
    ]


async def advance_cursors(
    tx: Connection,
    device_ids: Sequence[UUID],
    conversation_ids: Sequence[UUID],
    user_ids: Sequence[UUID],
    seqs: Sequence[int],
    now: datetime,
) -> None:
    """Move devices' own cursors forward, never back and never past the head. Each pair comes once."""
    await tx.execute(
        """
        INSERT INTO device_cursors AS d (device_id, conversation_id, user_id, delivered_seq, updated_at)
        SELECT a.device_id, a.conversation_id, a.user_id, LEAST(a.seq, c.last_seq), $5
        FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::bigint[]) AS a (device_id, conversation_id, user_id, seq)
        JOIN conversations c ON c.id = a.conversation_id
        JOIN conversation_members m ON m.conversation_id = a.conversation_id AND m.user_id = a.user_id AND m.is_active
        ORDER BY a.device_id, a.conversation_id
        ON CONFLICT (device_id, conversation_id) DO UPDATE
            SET delivered_seq = excluded.delivered_seq, updated_at = excluded.updated_at
            WHERE d.user_id = excluded.user_id AND d.delivered_seq < excluded.delivered_seq
        """,
        list(device_ids),
        list(conversation_ids),
        list(user_ids),
        list(seqs),
        now,
    )


async def thin_marks(connection: Connection, before: datetime, limit: int) -> int:
    """Keep only the last mark of each day among those older than `before`; how many went.

    The times of old messages become exact to the day; a message never loses its delivery or its reading.
    """
    status: str = await connection.execute(
        """
        DELETE FROM receipt_marks WHERE ctid = ANY (ARRAY(
            SELECT r.ctid FROM receipt_marks r
            WHERE r.at < $1 AND EXISTS (
                SELECT FROM receipt_marks later
                WHERE later.conversation_id = r.conversation_id AND later.user_id = r.user_id
                  AND later.kind = r.kind AND later.seq > r.seq
                  AND later.at < date_trunc('day', r.at, 'UTC') + interval '1 day'
            )
            LIMIT $2
        ))
        """,
        before,
        limit,
    )
    return int(status.rsplit(" ", 1)[1])


async def forget_cursors(connection: Connection, before: datetime, limit: int) -> int:
    """Drop cursors of devices that acknowledged nothing since `before`; how many went.

    Such a device is served like a new one if it comes back.
    """
    status: str = await connection.execute(
        """
        DELETE FROM device_cursors WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM device_cursors WHERE updated_at < $1 LIMIT $2
        ))
        """,
        before,
        limit,
    )
    return int(status.rsplit(" ", 1)[1])
