"""Statements on the audit trail: one chain for the whole service, appended and never changed."""

from __future__ import annotations

import asyncpg

from whispr.kit.db import Connection
from whispr.services.auth.models import AuditEvent

_AUDIT_LOCK = 7_301_002


async def lock_tail(tx: Connection) -> asyncpg.Record | None:
    """`number` and `hash` of the newest event, with the chain locked until the transaction ends.

    Take it last: it is held for the length of the commit, and everything that is audited goes through it.
    """
    await tx.execute("SELECT pg_advisory_xact_lock($1)", _AUDIT_LOCK)
    return await tx.fetchrow("SELECT number, hash FROM audit_events ORDER BY number DESC LIMIT 1")


async def append(tx: Connection, event: AuditEvent) -> None:
    await tx.execute(
        """
        INSERT INTO audit_events (number, at, event, account_id, device_id, details, previous_hash, hash)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
        """,
        event.number,
        event.at,
        event.event,
        event.account_id,
        event.device_id,
        event.details,
        event.previous_hash,
        event.hash,
    )


async def page(connection: Connection, after: int, limit: int) -> list[AuditEvent]:
    """Events numbered beyond `after`, in order."""
    rows = await connection.fetch(
        """
        SELECT number, at, event, account_id, device_id, details, previous_hash, hash FROM audit_events
        WHERE number > $1
        ORDER BY number
        LIMIT $2
        """,
        after,
        limit,
    )
    return [AuditEvent(*row) for row in rows]
