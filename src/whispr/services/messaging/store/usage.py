"""Counts over everybody."""

from __future__ import annotations

from datetime import datetime

import msgspec

from whispr.kit.db import Connection


class Count(msgspec.Struct, frozen=True):
    """How many there are of something, and of how many people they are."""

    name: str
    count: int
    people: int


async def messages_sent(connection: Connection, start: datetime, end: datetime) -> list[Count]:
    """Messages from `start` to before `end` by type, and how many of them were edited or erased since."""
    records = await connection.fetch(
        """
        WITH sent AS MATERIALIZED (
            SELECT message_type, sender_id, edited_at IS NOT NULL AS edited, is_deleted FROM messages
            WHERE sent_at >= $1 AND sent_at < $2
        )
        SELECT message_type, count(*), count(DISTINCT sender_id) FROM sent GROUP BY message_type
        UNION ALL SELECT 'edited', count(*), count(DISTINCT sender_id) FROM sent WHERE edited AND NOT is_deleted
        UNION ALL SELECT 'erased', count(*), count(DISTINCT sender_id) FROM sent WHERE is_deleted
        """,
        start,
        end,
        timeout=25.0,
    )
    return [Count(*record.values()) for record in records]


async def conversations_made(connection: Connection, start: datetime, end: datetime) -> list[Count]:
    """Conversations created from `start` to before `end`, by type."""
    records = await connection.fetch(
        """
        SELECT type, count(*), count(DISTINCT created_by) FROM conversations
        WHERE created_at >= $1 AND created_at < $2 GROUP BY type
        """,
        start,
        end,
        timeout=25.0,
    )
    return [Count(*record.values()) for record in records]


async def messages_scheduled(connection: Connection, start: datetime, end: datetime) -> Count:
    """Messages that were scheduled from `start` to before `end`, whenever they are sent."""
    (record,) = await connection.fetch(
        """
        SELECT 'scheduled', count(*), count(DISTINCT sender_id) FROM scheduled_messages
        WHERE created_at >= $1 AND created_at < $2
        """,
        start,
        end,
    )
    return Count(*record.values())


async def messages_reported(connection: Connection, start: datetime, end: datetime) -> Count:
    """Reports of messages from `start` to before `end`."""
    (record,) = await connection.fetch(
        """
        SELECT 'reported', count(*), count(DISTINCT reporter_id) FROM message_reports
        WHERE created_at >= $1 AND created_at < $2
        """,
        start,
        end,
    )
    return Count(*record.values())
