"""Statements that remove what has served its time, and those of maintenance."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.auth.models import DEVICE_EXPIRED

# Big enough to keep up, small enough that one statement holds its locks for well under a second.
BATCH = 5_000


def _count(status: str) -> int:
    return int(status.rsplit(" ", 1)[1])


async def drop_sessions(
    connection: Connection,
    now: datetime,
    revoked_before: datetime,
    device_expired_before: datetime,
    *,
    devices_expire: bool,
) -> int:
    """Remove a batch of sessions that expired, or were revoked long ago, with their tokens; how many.

    Those that say of a device that it was away for too long stay longer, and so does, while devices expire, the session
    with which an active one was last seen: it is what that will be said to.
    """
    return _count(
        await connection.execute(
            """
            DELETE FROM sessions WHERE id IN (
                SELECT s.id FROM sessions s
                WHERE (s.expires_at <= $1 OR s.revoked_at <= $2) AND CASE
                    WHEN s.revoke_reason = $6 THEN s.revoked_at <= $3
                    WHEN s.revoked_at IS NOT NULL THEN true
                    ELSE NOT ($5 AND EXISTS (
                        SELECT FROM devices d
                        WHERE d.id = s.device_id AND d.status = 'active'
                            AND s.last_used_at >= d.last_seen_day::timestamp AT TIME ZONE 'UTC'
                    ))
                END
                LIMIT $4 FOR UPDATE OF s SKIP LOCKED
            )
            """,
            now,
            revoked_before,
            device_expired_before,
            BATCH,
            devices_expire,
            DEVICE_EXPIRED,
        )
    )


async def drop_used_refresh_tokens(connection: Connection, used_before: datetime) -> int:
    """Remove a batch of refresh tokens used long ago: their session still recognises them by its family key."""
    return _count(
        await connection.execute(
            """
            DELETE FROM refresh_tokens WHERE digest IN (
                SELECT digest FROM refresh_tokens WHERE used_at <= $1 LIMIT $2 FOR UPDATE SKIP LOCKED
            )
            """,
            used_before,
            BATCH,
        )
    )


async def drop_idempotency_keys(connection: Connection, before: datetime) -> int:
    return _count(await connection.execute("DELETE FROM idempotency_keys WHERE created_at <= $1", before))


async def drop_revocations(connection: Connection, before: datetime) -> int:
    return _count(await connection.execute("DELETE FROM revocations WHERE at <= $1", before))


async def drop_spent_prekeys(connection: Connection, before: datetime) -> int:
    return _count(await connection.execute("DELETE FROM spent_prekeys WHERE spent_at <= $1", before))


async def expire_links(connection: Connection, now: datetime) -> None:
    """Forget what was brought to links whose time is over."""
    await connection.execute(
        """
        UPDATE device_links SET status = 'expired', device = NULL, request_digest = NULL, token_sealed = NULL
        WHERE status IN ('waiting', 'claimed', 'confirmed') AND expires_at <= $1
        """,
        now,
    )


async def drop_links(connection: Connection, before: datetime) -> None:
    await connection.execute("DELETE FROM device_links WHERE created_at <= $1", before)


async def drop_operations(connection: Connection, before: datetime) -> int:
    return _count(await connection.execute("DELETE FROM operations WHERE at <= $1", before))


async def answer_of(connection: Connection, operation_id: UUID, method: str) -> dict[str, Any] | None:
    """What a writing RPC answered the first time it came with this operation id."""
    answer: dict[str, Any] | None = await connection.fetchval(
        "SELECT answer FROM operations WHERE id = $1 AND method = $2", operation_id, method
    )
    return answer


async def remember_answer(
    tx: Connection, operation_id: UUID, method: str, answer: dict[str, Any], now: datetime
) -> None:
    await tx.execute(
        "INSERT INTO operations (id, method, answer, at) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
        operation_id,
        method,
        answer,
        now,
    )
