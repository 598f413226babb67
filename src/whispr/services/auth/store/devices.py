"""Statements on devices and device lists."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any
from uuid import UUID

import asyncpg

from whispr.kit.db import Connection
from whispr.services.auth.models import Device, DeviceList, NewDevice

_COLUMNS = """
    d.id, d.account_id, d.name, d.platform, d.registration_id, d.identity_key, d.signing_key, d.status, d.created_at,
    d.last_seen_day, d.expired_at,
    EXISTS (SELECT FROM push_tokens p WHERE p.device_id = d.id AND p.status = 'active') AS has_push_token
"""


def _device(row: asyncpg.Record | None) -> Device | None:
    return None if row is None else Device(*row)


async def insert(tx: Connection, device_id: UUID, account_id: UUID, device: NewDevice, now: datetime) -> None:
    await tx.execute(
        """
        INSERT INTO devices
            (id, account_id, name, platform, registration_id, identity_key, signing_key, created_at, last_seen_day)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
        """,
        device_id,
        account_id,
        device.name,
        device.platform,
        device.registration_id,
        device.identity_key,
        device.signing_key,
        now,
        now.date(),
    )


async def count_active(tx: Connection, account_id: UUID) -> int:
    return int(
        await tx.fetchval(
            "SELECT count(*) FROM devices WHERE account_id = $1 AND status = 'active'", account_id
        )
    )


async def by_id(connection: Connection, device_id: UUID) -> Device | None:
    return _device(await connection.fetchrow(f"SELECT {_COLUMNS} FROM devices d WHERE d.id = $1", device_id))


async def lock_active(tx: Connection, account_id: UUID, device_id: UUID) -> Device | None:
    """The account's active device, locked: changes of its keys and push tokens go one after the other."""
    return _device(
        await tx.fetchrow(
            f"""
            SELECT {_COLUMNS} FROM devices d
            WHERE d.id = $2 AND d.account_id = $1 AND d.status = 'active'
            FOR NO KEY UPDATE OF d
            """,
            account_id,
            device_id,
        )
    )


async def page(connection: Connection, account_id: UUID, after: UUID | None, limit: int) -> list[Device]:
    """The account's active devices with ids beyond `after`, oldest first."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM devices d
        WHERE d.account_id = $1 AND d.status = 'active' AND ($2::uuid IS NULL OR d.id > $2)
        ORDER BY d.id
        LIMIT $3
        """,
        account_id,
        after,
        limit,
    )
    return [Device(*row) for row in rows]


async def lists(connection: Connection, account_ids: Sequence[UUID]) -> list[DeviceList]:
    """Epoch and active devices of each living account, both of one moment."""
    rows = await connection.fetch(
        f"""
        SELECT a.id AS user_id, a.device_list_epoch, {_COLUMNS}
        FROM accounts a LEFT JOIN devices d ON d.account_id = a.id AND d.status = 'active'
        WHERE a.id = ANY($1::uuid[]) AND a.status <> 'deleted'
        ORDER BY a.id, d.id
        """,
        list(account_ids),
    )
    epochs: dict[UUID, int] = {}
    devices: dict[UUID, list[Device]] = {}
    for user_id, epoch, *values in rows:
        epochs[user_id] = epoch
        found = devices.setdefault(user_id, [])
        if values[0] is not None:
            found.append(_from_values(values))
    return [DeviceList(user_id, epoch, tuple(devices[user_id])) for user_id, epoch in epochs.items()]


def _from_values(values: list[Any]) -> Device:
    return Device(*values)


async def revoke(
    tx: Connection, device_ids: Sequence[UUID], now: datetime, *, are_expired: bool = False
) -> None:
    """End devices: their prekeys and push tokens are gone, their public keys stay for what they signed."""
    for table in ("lasting_prekeys", "one_time_prekeys", "spent_prekeys", "push_tokens"):
        await tx.execute(f"DELETE FROM {table} WHERE device_id = ANY($1::uuid[])", list(device_ids))
    await tx.execute(
        """
        UPDATE devices SET status = 'revoked', revoked_at = $2, expired_at = CASE WHEN $3 THEN $2::timestamptz END
        WHERE id = ANY($1::uuid[])
        """,
        list(device_ids),
        now,
        are_expired,
    )


async def accounts_with_absent(
    connection: Connection, before: date, after: UUID | None, limit: int
) -> list[UUID]:
    """Accounts beyond `after` with an active device that was last seen before the day `before`, in order."""
    rows = await connection.fetch(
        """
        SELECT DISTINCT account_id FROM devices
        WHERE status = 'active' AND last_seen_day < $1 AND ($2::uuid IS NULL OR account_id > $2)
        ORDER BY account_id
        LIMIT $3
        """,
        before,
        after,
        limit,
    )
    return [row["account_id"] for row in rows]


async def absent(tx: Connection, account_id: UUID, before: date) -> list[UUID]:
    """The account's active devices that were last seen before the day `before`."""
    rows = await tx.fetch(
        "SELECT id FROM devices WHERE account_id = $1 AND status = 'active' AND last_seen_day < $2 ORDER BY id",
        account_id,
        before,
    )
    return [row["id"] for row in rows]


async def lock_absent(tx: Connection, device_ids: Sequence[UUID], before: date) -> list[UUID]:
    """Those of the devices that are still active and not seen since, locked."""
    rows = await tx.fetch(
        """
        SELECT id FROM devices WHERE id = ANY($1::uuid[]) AND status = 'active' AND last_seen_day < $2
        ORDER BY id
        FOR NO KEY UPDATE
        """,
        list(device_ids),
        before,
    )
    return [row["id"] for row in rows]


async def seen(tx: Connection, device_id: UUID, day: date) -> None:
    """Note the day a device was last seen: no finer, because nobody needs to know when someone is awake."""
    await tx.execute(
        "UPDATE devices SET last_seen_day = $2 WHERE id = $1 AND last_seen_day < $2", device_id, day
    )
