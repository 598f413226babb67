"""Who may for a while only write to people they know."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.messaging.models.abuse import Restriction

_COLUMNS = "user_id, reason, until, created_at"


def _row(record: Any) -> Restriction:
    return Restriction(record["user_id"], record["reason"], record["until"], record["created_at"])


async def active(connection: Connection, now: datetime) -> list[Restriction]:
    """Every restriction in force."""
    records = await connection.fetch(f"SELECT {_COLUMNS} FROM sender_restrictions WHERE until > $1", now)
    return [_row(record) for record in records]


async def list_page(connection: Connection, now: datetime, after: UUID, limit: int) -> list[Restriction]:
    """Restrictions in force, in the order of the people's ids, from `after`."""
    records = await connection.fetch(
        f"SELECT {_COLUMNS} FROM sender_restrictions WHERE until > $1 AND user_id > $2 ORDER BY user_id LIMIT $3",
        now,
        after,
        limit,
    )
    return [_row(record) for record in records]


async def impose(tx: Connection, restriction: Restriction) -> bool:
    """Restrict somebody; False, and nothing changes, if they are restricted already."""
    imposed = await tx.fetchval(
        f"""
        INSERT INTO sender_restrictions AS r ({_COLUMNS}) VALUES ($1, $2, $3, $4)
        ON CONFLICT (user_id) DO UPDATE SET
            reason = excluded.reason, until = excluded.until, created_at = excluded.created_at
        WHERE r.until <= excluded.created_at
        RETURNING true
        """,
        restriction.user_id,
        restriction.reason,
        restriction.until,
        restriction.created_at,
    )
    return bool(imposed)


async def lift(tx: Connection, user_id: UUID, now: datetime) -> bool:
    """End a restriction; False if there was none in force."""
    until = await tx.fetchval("DELETE FROM sender_restrictions WHERE user_id = $1 RETURNING until", user_id)
    return until is not None and until > now


async def forget_ended(connection: Connection, now: datetime) -> None:
    """Drop restrictions that are over."""
    await connection.execute("DELETE FROM sender_restrictions WHERE until <= $1", now)


async def others_wrote(connection: Connection, conversation_id: UUID, user_id: UUID, within: int) -> bool:
    """Whether somebody else wrote one of the newest `within` messages of a conversation."""
    found: bool = await connection.fetchval(
        """
        SELECT EXISTS (
            SELECT FROM (
                SELECT sender_id FROM messages WHERE conversation_id = $1 ORDER BY seq DESC LIMIT $3
            ) AS newest WHERE sender_id <> $2
        )
        """,
        conversation_id,
        user_id,
        within,
    )
    return found
