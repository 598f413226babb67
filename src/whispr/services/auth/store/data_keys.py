"""Statements on the data keys that secrets at rest are encrypted under, themselves sealed under a root key."""

from __future__ import annotations

from whispr.kit.db import Connection
from whispr.services.auth.models import SealedKey


async def insert(tx: Connection, key: SealedKey) -> None:
    await tx.execute(
        "INSERT INTO data_keys (id, root_key_id, sealed, created_at) VALUES ($1, $2, $3, $4)",
        key.id,
        key.root_key_id,
        key.sealed,
        key.created_at,
    )


async def newest_first(connection: Connection) -> list[SealedKey]:
    """Every data key; the first one encrypts."""
    rows = await connection.fetch(
        "SELECT id, root_key_id, sealed, created_at FROM data_keys ORDER BY created_at DESC, id DESC"
    )
    return [SealedKey(*row) for row in rows]


async def drop_unused(tx: Connection, current_id: str) -> list[str]:
    """Remove keys that nothing lies under, but never the current one."""
    rows = await tx.fetch(
        """
        DELETE FROM data_keys k
        WHERE k.id <> $1
            AND NOT EXISTS (SELECT FROM push_tokens p WHERE p.data_key_id = k.id)
            AND NOT EXISTS (SELECT FROM second_factors f WHERE f.data_key_id = k.id)
        RETURNING k.id
        """,
        current_id,
    )
    return [row["id"] for row in rows]


async def reseal(tx: Connection, key_id: str, root_key_id: str, sealed: bytes) -> None:
    await tx.execute(
        "UPDATE data_keys SET root_key_id = $2, sealed = $3 WHERE id = $1", key_id, root_key_id, sealed
    )
