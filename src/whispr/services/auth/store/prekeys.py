"""Statements on prekeys. A one-time key leaves its table in the statement that hands it out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.auth.models import LastingKind, OneTimeKey, OneTimeKind, SignedKey


async def put_lasting(
    tx: Connection, device_id: UUID, kind: LastingKind, key: SignedKey, now: datetime
) -> None:
    """Replace the device's lasting key of this kind."""
    await tx.execute(
        """
        INSERT INTO lasting_prekeys (device_id, kind, key_id, public_key, signature, uploaded_at)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT (device_id, kind) DO UPDATE
        SET key_id = excluded.key_id, public_key = excluded.public_key, signature = excluded.signature,
            uploaded_at = excluded.uploaded_at
        """,
        device_id,
        kind,
        key.key_id,
        key.public_key,
        key.signature,
        now,
    )


async def lasting(
    connection: Connection, device_ids: Sequence[UUID]
) -> dict[tuple[UUID, LastingKind], SignedKey]:
    rows = await connection.fetch(
        """
        SELECT device_id, kind, key_id, public_key, signature FROM lasting_prekeys WHERE device_id = ANY($1::uuid[])
        """,
        list(device_ids),
    )
    return {
        (row["device_id"], row["kind"]): SignedKey(row["key_id"], row["public_key"], row["signature"])
        for row in rows
    }


async def add_one_time(
    tx: Connection, device_id: UUID, kind: OneTimeKind, keys: Sequence[OneTimeKey], digests: Sequence[bytes]
) -> None:
    """Append keys in their order; those stored already are passed over. `drop_spent` must follow."""
    await tx.execute(
        """
        INSERT INTO one_time_prekeys (device_id, kind, key_id, public_key, signature, digest)
        SELECT $1, $2, k.key_id, k.public_key, k.signature, k.digest
        FROM unnest($3::bigint[], $4::bytea[], $5::bytea[], $6::bytea[]) WITH ORDINALITY
            AS k (key_id, public_key, signature, digest, place)
        ORDER BY k.place
        ON CONFLICT DO NOTHING
        """,
        device_id,
        kind,
        [key.key_id for key in keys],
        [key.public_key for key in keys],
        [key.signature for key in keys],
        list(digests),
    )


async def drop_spent(tx: Connection, device_id: UUID) -> None:
    """Remove keys that were handed out before they were added again.

    A statement after the insert, not a condition of it: an insert that waits for a claim to commit has looked at the
    spent keys before that claim.
    """
    await tx.execute(
        """
        DELETE FROM one_time_prekeys o USING spent_prekeys s
        WHERE o.device_id = $1 AND s.device_id = $1 AND s.digest = o.digest
        """,
        device_id,
    )


async def conflicts(
    tx: Connection, device_id: UUID, kind: OneTimeKind, keys: Sequence[OneTimeKey], digests: Sequence[bytes]
) -> list[int]:
    """Ids of keys that contradict stored ones: the id with other bytes, or the bytes under another id."""
    rows = await tx.fetch(
        """
        SELECT DISTINCT k.key_id
        FROM unnest($3::bigint[], $4::bytea[]) AS k (key_id, digest)
        JOIN one_time_prekeys p ON p.device_id = $1 AND (
            (p.kind = $2 AND p.key_id = k.key_id AND p.digest <> k.digest)
            OR (p.digest = k.digest AND (p.kind <> $2 OR p.key_id <> k.key_id))
        )
        ORDER BY k.key_id
        """,
        device_id,
        kind,
        [key.key_id for key in keys],
        list(digests),
    )
    return [row["key_id"] for row in rows]


async def claim_one_time(
    tx: Connection, device_ids: Sequence[UUID], kind: OneTimeKind, now: datetime
) -> dict[UUID, OneTimeKey]:
    """Take the oldest free key of each device, for ever. Keys another transaction is taking are passed over.

    The pick is materialised because a planner that ran it twice would delete two keys and hand out one.
    """
    rows = await tx.fetch(
        """
        WITH picked AS MATERIALIZED (
            SELECT p.device_id, p.kind, p.key_id
            FROM unnest($1::uuid[]) AS wanted (device_id), LATERAL (
                SELECT o.device_id, o.kind, o.key_id FROM one_time_prekeys o
                WHERE o.device_id = wanted.device_id AND o.kind = $2
                ORDER BY o.position
                LIMIT 1
                FOR UPDATE SKIP LOCKED
            ) AS p
        ), taken AS (
            DELETE FROM one_time_prekeys o USING picked
            WHERE o.device_id = picked.device_id AND o.kind = picked.kind AND o.key_id = picked.key_id
            RETURNING o.device_id, o.key_id, o.public_key, o.signature, o.digest
        ), spent AS (
            INSERT INTO spent_prekeys (device_id, digest, spent_at) SELECT device_id, digest, $3 FROM taken
        )
        SELECT device_id, key_id, public_key, signature FROM taken
        """,
        list(device_ids),
        kind,
        now,
    )
    return {row["device_id"]: OneTimeKey(row["key_id"], row["public_key"], row["signature"]) for row in rows}


async def count(connection: Connection, device_id: UUID) -> dict[OneTimeKind, int]:
    rows = await connection.fetch(
        "SELECT kind, count(*) AS n FROM one_time_prekeys WHERE device_id = $1 GROUP BY kind", device_id
    )
    found: dict[OneTimeKind, int] = {row["kind"]: row["n"] for row in rows}
    return {"ec": found.get("ec", 0), "pq": found.get("pq", 0)}


_LOW_COLUMN: dict[OneTimeKind, str] = {"ec": "ec_prekeys_low", "pq": "pq_prekeys_low"}


def _remaining(device_id: str) -> str:
    return f"""(
        SELECT count(*) FROM (
            SELECT FROM one_time_prekeys o WHERE o.device_id = {device_id} AND o.kind = $2 LIMIT $3
        ) AS stock
    )"""


async def unmarked_low(
    connection: Connection, device_ids: Sequence[UUID], kind: OneTimeKind, low: int
) -> list[UUID]:
    """Those of the devices that have fewer than `low` keys and are not marked so."""
    rows = await connection.fetch(
        f"""
        SELECT d.id FROM devices d
        WHERE d.id = ANY($1::uuid[]) AND NOT d.{_LOW_COLUMN[kind]} AND {_remaining("d.id")} < $3
        """,
        list(device_ids),
        kind,
        low,
    )
    return [row["id"] for row in rows]


async def mark_low(
    connection: Connection, device_id: UUID, kind: OneTimeKind, low: int
) -> tuple[UUID, int] | None:
    """Mark a device with fewer than `low` keys: its account and what remains; None if another was first.

    Never in the claim's transaction: that would wait here for an upload which may be waiting for the claim.
    """
    column = _LOW_COLUMN[kind]
    row = await connection.fetchrow(
        f"""
        UPDATE devices d SET {column} = true
        WHERE d.id = $1 AND NOT d.{column} AND {_remaining("d.id")} < $3
        RETURNING d.account_id, {_remaining("d.id")} AS remaining
        """,
        device_id,
        kind,
        low,
    )
    return None if row is None else (row["account_id"], row["remaining"])


async def unmark_low(tx: Connection, device_id: UUID, kind: OneTimeKind) -> None:
    column = _LOW_COLUMN[kind]
    await tx.execute(f"UPDATE devices SET {column} = false WHERE id = $1 AND {column}", device_id)
