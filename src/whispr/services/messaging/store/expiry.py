"""What time takes away: messages whose seconds are over, and what is older than retention keeps."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec

from whispr.kit.db import Connection
from whispr.services.messaging.models import CommittedEvent
from whispr.services.messaging.store import conversations


class Held(msgspec.Struct, frozen=True):
    """A conversation that the transaction holds."""

    id: UUID
    last_seq: int
    purged_seq: int
    retention_seconds: int | None
    updated_at: datetime


async def hold(tx: Connection, conversation_id: UUID, *, wait: bool) -> Held | None:
    """Hold a conversation until the transaction ends; None if there is none, or if somebody has it and we do not wait."""
    record = await tx.fetchrow(
        f"""
        SELECT id, last_seq, purged_seq, retention_seconds, updated_at FROM conversations
        WHERE id = $1 FOR UPDATE {"" if wait else "SKIP LOCKED"}
        """,
        conversation_id,
    )
    return Held(*record.values()) if record else None


async def append_silently(
    tx: Connection, held: Held, events: Sequence[tuple[str, dict[str, Any]]], now: datetime
) -> list[CommittedEvent]:
    """Append events that are no news: people's lists stay in their order, and what they hid stays hidden.

    Publish what it returns after the commit.
    """
    appended = await conversations.append_events(tx, held.id, events, now)
    await tx.execute(
        """
        WITH unmoved AS (
            UPDATE conversations SET updated_at = $4 WHERE id = $1
        )
        UPDATE conversation_members SET hidden_seq = $3 WHERE conversation_id = $1 AND hidden_seq >= $2
        """,
        held.id,
        held.last_seq,
        appended[-1].seq,
        held.updated_at,
    )
    return appended


# Messages that expire.


async def next_due(connection: Connection) -> datetime | None:
    """When the next message expires."""
    due: datetime | None = await connection.fetchval(
        """
        SELECT expires_at FROM messages WHERE expires_at IS NOT NULL AND NOT is_deleted
        ORDER BY expires_at LIMIT 1
        """
    )
    return due


async def due_conversations(connection: Connection, now: datetime, limit: int) -> dict[UUID, datetime]:
    """Where the longest overdue messages are, and since when the first of each is overdue."""
    records = await connection.fetch(
        """
        SELECT conversation_id, min(expires_at) AS since FROM (
            SELECT conversation_id, expires_at FROM messages
            WHERE expires_at <= $1 AND NOT is_deleted ORDER BY expires_at LIMIT $2
        ) AS due
        GROUP BY conversation_id ORDER BY since
        """,
        now,
        limit,
    )
    return {record["conversation_id"]: record["since"] for record in records}


async def due_messages(tx: Connection, conversation_id: UUID, now: datetime, limit: int) -> list[UUID]:
    """The longest overdue messages of one conversation."""
    records = await tx.fetch(
        """
        SELECT id FROM messages WHERE conversation_id = $1 AND expires_at <= $2 AND NOT is_deleted
        ORDER BY expires_at LIMIT $3
        """,
        conversation_id,
        now,
        limit,
    )
    return [record["id"] for record in records]


async def any_awaits_readers(connection: Connection) -> bool:
    """Whether any message at all waits to be read before its seconds begin."""
    found: bool = await connection.fetchval(
        """
        SELECT EXISTS (SELECT FROM messages WHERE expires_from_read AND expires_at IS NULL AND NOT is_deleted)
        """
    )
    return found


async def awaiting_readers(connection: Connection, after: UUID, limit: int) -> list[UUID]:
    """Conversations, by id, with messages that wait to be read before their seconds begin."""
    records = await connection.fetch(
        """
        SELECT DISTINCT conversation_id FROM messages
        WHERE expires_from_read AND expires_at IS NULL AND NOT is_deleted AND conversation_id > $1
        ORDER BY conversation_id LIMIT $2
        """,
        after,
        limit,
    )
    return [record["conversation_id"] for record in records]


async def start_seconds(connection: Connection, conversation_ids: Sequence[UUID], now: datetime) -> int:
    """Let the seconds begin of messages that everybody has read who still could; how many that are.

    Whoever came after the message cannot read it and is not waited for, nor is who has left.
    """
    status: str = await connection.execute(
        """
        UPDATE messages m SET expires_at = $2::timestamptz + make_interval(secs => m.expires_in)
        WHERE m.conversation_id = ANY($1) AND m.expires_from_read AND m.expires_at IS NULL AND NOT m.is_deleted
          AND NOT EXISTS (
            SELECT FROM conversation_members r
            WHERE r.conversation_id = m.conversation_id AND r.is_active AND r.user_id <> m.sender_id
              AND r.floor_seq < m.seq AND r.read_seq < m.seq
          )
        """,
        list(conversation_ids),
        now,
    )
    return int(status.rsplit(" ", 1)[1])


# Retention.


class Outdated(msgspec.Struct, frozen=True):
    """One page of the walk over all conversations: those that hold something too old, and where the walk goes on."""

    conversation_ids: list[UUID]
    last: UUID | None


async def outdated_conversations(
    connection: Connection, after: UUID, now: datetime, longest: timedelta | None, limit: int
) -> Outdated:
    """Look at the next `limit` conversations after `after`, those with retention of their own or, with `longest`, all.

    The log is dense and in order of time, so its first entry after what was purged tells. A conversation that holds nothing
    but word of its last purge is left alone, or each purge would make the next one.
    """
    records = await connection.fetch(
        """
        WITH looked_at AS (
            SELECT id, last_seq, purged_seq,
                   LEAST(make_interval(secs => retention_seconds), $3::interval) AS kept
            FROM conversations
            WHERE id > $1 AND ($3::interval IS NOT NULL OR retention_seconds IS NOT NULL)
            ORDER BY id LIMIT $4
        )
        SELECT l.id, EXISTS (
            SELECT FROM (
                SELECT m.sent_at AS at, true AS counts FROM messages m
                WHERE m.conversation_id = l.id AND m.seq = l.purged_seq + 1
                UNION ALL
                SELECT e.created_at, e.event <> 'history_purged' OR l.last_seq > e.seq FROM conversation_events e
                WHERE e.conversation_id = l.id AND e.seq = l.purged_seq + 1
            ) AS first
            WHERE first.at < $2::timestamptz - l.kept AND first.counts
        ) AS is_outdated
        FROM looked_at l ORDER BY l.id
        """,
        after,
        now,
        longest,
        limit,
    )
    return Outdated(
        [record["id"] for record in records if record["is_outdated"]],
        records[-1]["id"] if len(records) == limit else None,
    )


class Stretch(msgspec.Struct, frozen=True):
    """The oldest entries of a log. `until_seq`: the last one that is too old. `worthwhile`: more than word of one purge."""

    until_seq: int
    worthwhile: bool


async def outdated_stretch(tx: Connection, held: Held, before: datetime, limit: int) -> Stretch:
    """What of the first `limit` entries after the last purge is older than `before`, up to the first that is not."""
    (record,) = await tx.fetch(
        """
        WITH entry AS (
            SELECT seq, sent_at AS at, true AS counts FROM messages
            WHERE conversation_id = $1 AND seq > $2 AND seq <= $2 + $4
            UNION ALL
            SELECT seq, created_at, event <> 'history_purged' FROM conversation_events
            WHERE conversation_id = $1 AND seq > $2 AND seq <= $2 + $4
        ), old AS (
            SELECT * FROM entry WHERE seq < coalesce((SELECT min(seq) FROM entry WHERE at >= $3), $2 + $4 + 1)
        )
        SELECT coalesce(max(seq), $2) AS until_seq, coalesce(bool_or(counts) OR count(*) > 1, false) AS worthwhile
        FROM old
        """,
        held.id,
        held.purged_seq,
        before,
        limit,
    )
    return Stretch(*record.values())


async def purge(tx: Connection, held: Held, until_seq: int) -> int:
    """Delete a conversation's log up to `until_seq` with all that hangs on it; how many messages and events went.

    Media is told which messages refer to nothing any more. Marks of receipts go too: they date messages at or below them.
    """
    gone: int = await tx.fetchval(
        """
        WITH message AS (
            DELETE FROM messages WHERE conversation_id = $1 AND seq > $2 AND seq <= $3 RETURNING id
        ), event AS (
            DELETE FROM conversation_events WHERE conversation_id = $1 AND seq > $2 AND seq <= $3 RETURNING seq
        ), unreacted AS (
            DELETE FROM message_reactions r USING message m WHERE r.conversation_id = $1 AND r.message_id = m.id
        ), unpinned AS (
            DELETE FROM message_pins p USING message m WHERE p.conversation_id = $1 AND p.message_id = m.id
        ), unmarked AS (
            DELETE FROM receipt_marks WHERE conversation_id = $1 AND seq <= $3
        ), unpictured AS (
            DELETE FROM message_media l USING message m WHERE l.conversation_id = $1 AND l.message_id = m.id
            RETURNING l.message_id, l.sender_id, l.media_id
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
        ), moved AS (
            UPDATE conversations SET purged_seq = $3 WHERE id = $1
        )
        SELECT (SELECT count(*) FROM message) + (SELECT count(*) FROM event)
        """,
        held.id,
        held.purged_seq,
        until_seq,
    )
    return gone


async def set_retention(tx: Connection, conversation_id: UUID, seconds: int | None) -> None:
    """How old messages of the conversation may get; its event sets the time of the change."""
    await tx.execute(
        "UPDATE conversations SET retention_seconds = $2 WHERE id = $1", conversation_id, seconds
    )


async def vacuum_messages(connection: Connection) -> None:
    """Take dead versions of messages out of their pages: an erased content is still in there until then."""
    partitions = await connection.fetch(
        """
        SELECT p.relid::regclass::text AS name
        FROM pg_partition_tree('messages') p JOIN pg_stat_user_tables s ON s.relid = p.relid
        WHERE s.n_dead_tup > 0 ORDER BY name
        """
    )
    for partition in partitions:
        await connection.execute(f"VACUUM {partition['name']}", timeout=600.0)
