"""Statements on the linking of devices."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import asyncpg
import msgspec

from whispr.kit.db import Connection
from whispr.services.auth.models import Link, NewDevice

_COLUMNS = """
    id, account_id, by_device_id, by_session_id, status, created_at, expires_at, device, check_code, wrong_confirms,
    device_id, session_id
"""


def _link(row: asyncpg.Record | None) -> Link | None:
    if row is None:
        return None
    values = dict(row)
    device = values.pop("device")
    return Link(
        stored_status=values.pop("status"),
        device=None if device is None else msgspec.convert(device, NewDevice),
        **values,
    )


async def insert(
    tx: Connection,
    link_id: UUID,
    account_id: UUID,
    by_device_id: UUID,
    by_session_id: UUID,
    token_digest: bytes,
    request_digest: bytes | None,
    token_sealed: bytes | None,
    now: datetime,
    expires_at: datetime,
) -> None:
    """Add a link. `request_digest` and `token_sealed` are for a repeat of the request that made it."""
    await tx.execute(
        """
        INSERT INTO device_links
            (id, account_id, by_device_id, by_session_id, token_digest, request_digest, token_sealed, status,
            created_at, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, 'waiting', $8, $9)
        """,
        link_id,
        account_id,
        by_device_id,
        by_session_id,
        token_digest,
        request_digest,
        token_sealed,
        now,
        expires_at,
    )


async def waiting_of_request(
    tx: Connection, account_id: UUID, request_digest: bytes, now: datetime
) -> tuple[UUID, bytes, datetime] | None:
    """(id, sealed token, end) of the unclaimed link that this request has made already."""
    row = await tx.fetchrow(
        """
        SELECT id, token_sealed, expires_at FROM device_links
        WHERE account_id = $1 AND request_digest = $2 AND status = 'waiting' AND expires_at > $3
        """,
        account_id,
        request_digest,
        now,
    )
    return None if row is None else (row["id"], row["token_sealed"], row["expires_at"])


async def replace_open(tx: Connection, account_id: UUID, by_device_id: UUID, now: datetime) -> None:
    """Refuse the unfinished links that this device has begun: one device links one at a time."""
    await tx.execute(
        """
        UPDATE device_links
        SET status = 'refused', device = NULL, request_digest = NULL, token_sealed = NULL, expires_at = $3
        WHERE account_id = $1 AND by_device_id = $2 AND status IN ('waiting', 'claimed', 'confirmed')
        """,
        account_id,
        by_device_id,
        now,
    )


async def by_id(connection: Connection, link_id: UUID) -> Link | None:
    return _link(await connection.fetchrow(f"SELECT {_COLUMNS} FROM device_links WHERE id = $1", link_id))


async def account_of(connection: Connection, token_digest: bytes) -> UUID | None:
    """Whose link this token belongs to."""
    account_id: UUID | None = await connection.fetchval(
        "SELECT account_id FROM device_links WHERE token_digest = $1", token_digest
    )
    return account_id


async def lock(tx: Connection, link_id: UUID) -> Link | None:
    """The link, locked: its steps go one after the other."""
    return _link(await tx.fetchrow(f"SELECT {_COLUMNS} FROM device_links WHERE id = $1 FOR UPDATE", link_id))


async def lock_by_token(tx: Connection, token_digest: bytes) -> Link | None:
    """As `lock`, by the digest of its token."""
    return _link(
        await tx.fetchrow(
            f"SELECT {_COLUMNS} FROM device_links WHERE token_digest = $1 FOR UPDATE", token_digest
        )
    )


async def claim(
    tx: Connection, link_id: UUID, device: NewDevice, check_code: str, expires_at: datetime
) -> None:
    """Note what a device brought. The sealed token has served: nobody is given it again."""
    await tx.execute(
        """
        UPDATE device_links
        SET status = 'claimed', device = $2, check_code = $3, request_digest = NULL, token_sealed = NULL,
            expires_at = $4
        WHERE id = $1
        """,
        link_id,
        device,
        check_code,
        expires_at,
    )


async def confirm(tx: Connection, link_id: UUID, expires_at: datetime) -> None:
    await tx.execute(
        "UPDATE device_links SET status = 'confirmed', expires_at = $2 WHERE id = $1", link_id, expires_at
    )


async def count_wrong_confirm(tx: Connection, link_id: UUID) -> None:
    await tx.execute("UPDATE device_links SET wrong_confirms = wrong_confirms + 1 WHERE id = $1", link_id)


async def refuse(tx: Connection, link_id: UUID, now: datetime) -> None:
    await tx.execute(
        """
        UPDATE device_links
        SET status = 'refused', device = NULL, request_digest = NULL, token_sealed = NULL, expires_at = $2
        WHERE id = $1
        """,
        link_id,
        now,
    )


async def finish(
    tx: Connection, link_id: UUID, device_id: UUID, session_id: UUID, expires_at: datetime
) -> None:
    await tx.execute(
        """
        UPDATE device_links
        SET status = 'finished', device = NULL, device_id = $2, session_id = $3, expires_at = $4
        WHERE id = $1
        """,
        link_id,
        device_id,
        session_id,
        expires_at,
    )
