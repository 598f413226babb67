"""Statements on sessions, refresh tokens, idempotency keys and revocations."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from whispr.kit.db import Connection
from whispr.kit.identity import Revocation
from whispr.services.auth.models import Family, RefreshRecord, SessionRecord, Subject


async def insert(tx: Connection, family: Family, now: datetime) -> None:
    await tx.execute(
        """
        INSERT INTO sessions (id, account_id, device_id, family_key, created_at, last_used_at, expires_at)
        VALUES ($1, $2, $3, $4, $5, $5, $6)
        """,
        family.session_id,
        family.account_id,
        family.device_id,
        family.family_key,
        now,
        family.expires_at,
    )


async def lock_family(tx: Connection, session_id: UUID) -> Family | None:
    """The session, locked: refreshes of one family go one after the other."""
    row = await tx.fetchrow(
        """
        SELECT id, account_id, device_id, family_key, expires_at, revoked_at, revoke_reason FROM sessions
        WHERE id = $1
        FOR NO KEY UPDATE
        """,
        session_id,
    )
    return None if row is None else Family(*row)


async def used(tx: Connection, session_id: UUID, now: datetime, expires_at: datetime) -> None:
    await tx.execute(
        "UPDATE sessions SET last_used_at = $2, expires_at = $3 WHERE id = $1", session_id, now, expires_at
    )


async def page(
    connection: Connection, account_id: UUID, now: datetime, after: UUID | None, limit: int
) -> list[SessionRecord]:
    """The account's living sessions with ids beyond `after`, oldest first."""
    rows = await connection.fetch(
        """
        SELECT s.id, s.account_id, s.device_id, d.name, d.platform, s.created_at, s.last_used_at, s.expires_at
        FROM sessions s JOIN devices d ON d.id = s.device_id
        WHERE s.account_id = $1 AND s.revoked_at IS NULL AND s.expires_at > $2 AND ($3::uuid IS NULL OR s.id > $3)
        ORDER BY s.id
        LIMIT $4
        """,
        account_id,
        now,
        after,
        limit,
    )
    return [SessionRecord(*row) for row in rows]


async def owner(connection: Connection, session_id: UUID) -> UUID | None:
    """Whose session this is, ended ones included."""
    owner_id: UUID | None = await connection.fetchval(
        "SELECT account_id FROM sessions WHERE id = $1", session_id
    )
    return owner_id


async def is_live(connection: Connection, session_id: UUID, now: datetime) -> bool:
    return bool(
        await connection.fetchval(
            "SELECT EXISTS (SELECT FROM sessions WHERE id = $1 AND revoked_at IS NULL AND expires_at > $2)",
            session_id,
            now,
        )
    )


async def live_of_device(tx: Connection, device_id: UUID, now: datetime) -> list[UUID]:
    """The device's living sessions, newest first."""
    rows = await tx.fetch(
        """
        SELECT id FROM sessions
        WHERE device_id = $1 AND revoked_at IS NULL AND expires_at > $2
        ORDER BY id DESC
        """,
        device_id,
        now,
    )
    return [row["id"] for row in rows]


async def lock_of_devices(tx: Connection, device_ids: Sequence[UUID]) -> list[tuple[UUID, UUID]]:
    """(session, device) of what the devices have not ended, expired ones included; locked, refreshes under way awaited."""
    rows = await tx.fetch(
        """
        SELECT id, device_id FROM sessions WHERE device_id = ANY($1::uuid[]) AND revoked_at IS NULL
        ORDER BY id
        FOR NO KEY UPDATE
        """,
        list(device_ids),
    )
    return [(row["id"], row["device_id"]) for row in rows]


async def live_of_account(tx: Connection, account_id: UUID) -> list[UUID]:
    rows = await tx.fetch(
        "SELECT id FROM sessions WHERE account_id = $1 AND revoked_at IS NULL ORDER BY id", account_id
    )
    return [row["id"] for row in rows]


async def revoke(tx: Connection, session_ids: Sequence[UUID], reason: str, now: datetime) -> list[UUID]:
    """End sessions; those that were not ended before."""
    rows = await tx.fetch(
        """
        UPDATE sessions SET revoked_at = $3, revoke_reason = $2
        WHERE id = ANY($1::uuid[]) AND revoked_at IS NULL
        RETURNING id
        """,
        list(session_ids),
        reason,
        now,
    )
    return [row["id"] for row in rows]


async def add_refresh_token(
    tx: Connection, digest: bytes, session_id: UUID, now: datetime, expires_at: datetime
) -> None:
    await tx.execute(
        "INSERT INTO refresh_tokens (digest, session_id, issued_at, expires_at) VALUES ($1, $2, $3, $4)",
        digest,
        session_id,
        now,
        expires_at,
    )


async def refresh_token(tx: Connection, digest: bytes) -> RefreshRecord | None:
    """The token with this digest. The caller holds the lock of its family."""
    row = await tx.fetchrow(
        """
        SELECT session_id, expires_at, used_at, successor_digest, successor_sealed FROM refresh_tokens
        WHERE digest = $1
        """,
        digest,
    )
    return None if row is None else RefreshRecord(*row)


async def spend_refresh_token(
    tx: Connection, digest: bytes, successor_digest: bytes, successor_sealed: bytes, now: datetime
) -> None:
    await tx.execute(
        """
        UPDATE refresh_tokens SET used_at = $4, successor_digest = $2, successor_sealed = $3
        WHERE digest = $1 AND used_at IS NULL
        """,
        digest,
        successor_digest,
        successor_sealed,
        now,
    )


async def remember_key(
    tx: Connection, username: str, key_digest: bytes, request_digest: bytes, session_id: UUID, now: datetime
) -> bool:
    """Tie an Idempotency-Key to the session it made; False if it is tied already. Waits for a twin to commit."""
    status = await tx.execute(
        """
        INSERT INTO idempotency_keys (username, key_digest, request_digest, session_id, created_at)
        VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT DO NOTHING
        """,
        username,
        key_digest,
        request_digest,
        session_id,
        now,
    )
    return status == "INSERT 0 1"


async def session_of_key(
    connection: Connection, username: str, key_digest: bytes, since: datetime
) -> asyncpg.Record | None:
    """`request_digest`, `session_id` of an Idempotency-Key used after `since`."""
    return await connection.fetchrow(
        """
        SELECT request_digest, session_id FROM idempotency_keys
        WHERE username = $1 AND key_digest = $2 AND created_at > $3
        """,
        username,
        key_digest,
        since,
    )


async def forget_key(tx: Connection, username: str, key_digest: bytes, before: datetime) -> None:
    """Make room for a key whose time is over but which no cleanup has met yet."""
    await tx.execute(
        "DELETE FROM idempotency_keys WHERE username = $1 AND key_digest = $2 AND created_at <= $3",
        username,
        key_digest,
        before,
    )


async def add_revocations(tx: Connection, subject: Subject, ids: Sequence[UUID], now: datetime) -> None:
    await tx.execute(
        "INSERT INTO revocations (subject, subject_id, at) SELECT $1, unnest($2::uuid[]), $3",
        subject.value,
        list(ids),
        now,
    )


async def revocations(connection: Connection, since: datetime) -> list[Revocation]:
    rows = await connection.fetch(
        "SELECT subject, subject_id, at FROM revocations WHERE at >= $1 ORDER BY id", since
    )
    return [Revocation(subject=row["subject"], id=row["subject_id"], at=row["at"]) for row in rows]
