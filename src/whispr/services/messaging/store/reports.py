"""Reports of messages."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.messaging.models.abuse import Report, ReportReason

_COLUMNS = "id, conversation_id, message_id, reporter_id, reported_id, reason, comment, plaintext, is_verified, created_at"


def _row(record: Any) -> Report:
    return Report(
        id=record["id"],
        conversation_id=record["conversation_id"],
        message_id=record["message_id"],
        reporter_id=record["reporter_id"],
        reported_id=record["reported_id"],
        reason=ReportReason(record["reason"]),
        comment=record["comment"],
        plaintext=record["plaintext"],
        is_verified=record["is_verified"],
        created_at=record["created_at"],
    )


async def visible_message(
    connection: Connection, message_id: UUID, user_id: UUID
) -> tuple[UUID, UUID, bytes] | None:
    """Conversation, sender and content of a message, if the person is a member who may see it."""
    record = await connection.fetchrow(
        """
        SELECT e.conversation_id, e.sender_id, e.content
        FROM messages e
        JOIN conversations c ON c.id = e.conversation_id
        JOIN conversation_members m ON m.conversation_id = e.conversation_id AND m.user_id = $2 AND m.is_active
        WHERE e.id = $1 AND e.seq > GREATEST(m.floor_seq, c.purged_seq)
        """,
        message_id,
        user_id,
    )
    return (record["conversation_id"], record["sender_id"], record["content"]) if record else None


async def find(connection: Connection, message_id: UUID, reporter_id: UUID) -> Report | None:
    """What the person reported of the message."""
    record = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM message_reports WHERE message_id = $1 AND reporter_id = $2",
        message_id,
        reporter_id,
    )
    return _row(record) if record else None


async def insert(tx: Connection, report: Report) -> bool:
    """Store a report; False if the person has reported the message before."""
    stored = await tx.fetchval(
        f"""
        INSERT INTO message_reports ({_COLUMNS}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
        ON CONFLICT (message_id, reporter_id) DO NOTHING RETURNING true
        """,
        report.id,
        report.conversation_id,
        report.message_id,
        report.reporter_id,
        report.reported_id,
        report.reason.value,
        report.comment,
        report.plaintext,
        report.is_verified,
        report.created_at,
    )
    return bool(stored)


async def forget_reporter(tx: Connection, reporter_id: UUID) -> None:
    """Drop what the person reported."""
    await tx.execute("DELETE FROM message_reports WHERE reporter_id = $1", reporter_id)


async def forget_old(connection: Connection, before: datetime, limit: int) -> int:
    """Drop reports made before that time, `limit` at most; how many there were."""
    gone = await connection.fetch(
        """
        DELETE FROM message_reports WHERE id IN (
            SELECT id FROM message_reports WHERE created_at < $1 LIMIT $2
        ) RETURNING 1
        """,
        before,
        limit,
    )
    return len(gone)
