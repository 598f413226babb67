"""Statements on signing keys, and the lock under which keys of any kind are made."""

from __future__ import annotations

from collections.abc import Sequence

from whispr.kit.db import Connection
from whispr.services.auth.models import SigningKeyRecord

_KEYS_LOCK = 7_301_001


async def lock_keys(tx: Connection) -> None:
    """One process at a time makes or drops keys; without it every replica would rotate when rotation is due."""
    await tx.execute("SELECT pg_advisory_xact_lock($1)", _KEYS_LOCK)


async def signing_keys(connection: Connection) -> list[SigningKeyRecord]:
    """Every signing key, in the order they sign."""
    rows = await connection.fetch(
        """
        SELECT id, public_key, root_key_id, sealed, created_at, active_from FROM signing_keys ORDER BY active_from, id
        """
    )
    return [SigningKeyRecord(*row) for row in rows]


async def insert_signing_key(tx: Connection, key: SigningKeyRecord) -> None:
    await tx.execute(
        """
        INSERT INTO signing_keys (id, public_key, root_key_id, sealed, created_at, active_from)
        VALUES ($1, $2, $3, $4, $5, $6)
        """,
        key.id,
        key.public_key,
        key.root_key_id,
        key.sealed,
        key.created_at,
        key.active_from,
    )


async def drop_signing_keys(tx: Connection, key_ids: Sequence[str]) -> None:
    await tx.execute("DELETE FROM signing_keys WHERE id = ANY($1::text[])", list(key_ids))


async def reseal_signing_key(tx: Connection, key_id: str, root_key_id: str, sealed: bytes) -> None:
    await tx.execute(
        "UPDATE signing_keys SET root_key_id = $2, sealed = $3 WHERE id = $1", key_id, root_key_id, sealed
    )


async def roots_in_use(connection: Connection) -> list[str]:
    """Ids of the root keys that something in this database is sealed under."""
    rows = await connection.fetch(
        "SELECT root_key_id FROM data_keys UNION SELECT root_key_id FROM signing_keys"
    )
    return [row["root_key_id"] for row in rows]
