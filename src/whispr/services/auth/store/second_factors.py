"""Statements on second factors and recovery codes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.auth.models import Encrypted, SecondFactorRecord, SecondFactorState


async def lock(tx: Connection, account_id: UUID) -> SecondFactorRecord | None:
    """The account's second factor, locked: of two uses of one code only one counts."""
    row = await tx.fetchrow(
        """
        SELECT data_key_id, nonce, ciphertext, confirmed_at, last_step, failures, locked_until, request_digest
        FROM second_factors
        WHERE account_id = $1
        FOR UPDATE
        """,
        account_id,
    )
    return None if row is None else SecondFactorRecord(Encrypted(*row[:3]), *row[3:])


async def put(
    tx: Connection, account_id: UUID, encrypted: Encrypted, request_digest: bytes | None, now: datetime
) -> None:
    """A new secret to be confirmed, in place of one that was not. Failures stay counted."""
    await tx.execute(
        """
        INSERT INTO second_factors (account_id, data_key_id, nonce, ciphertext, created_at, request_digest)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT (account_id) DO UPDATE
        SET data_key_id = excluded.data_key_id, nonce = excluded.nonce, ciphertext = excluded.ciphertext,
            created_at = excluded.created_at, request_digest = excluded.request_digest, last_step = 0
        """,
        account_id,
        encrypted.data_key_id,
        encrypted.nonce,
        encrypted.ciphertext,
        now,
        request_digest,
    )


async def confirm(tx: Connection, account_id: UUID, now: datetime) -> None:
    await tx.execute("UPDATE second_factors SET confirmed_at = $2 WHERE account_id = $1", account_id, now)


async def accept(tx: Connection, account_id: UUID, step: int) -> None:
    """A code of time step `step` was right: it and those before are spent, failures forgotten."""
    await tx.execute(
        "UPDATE second_factors SET last_step = $2, failures = 0, locked_until = NULL WHERE account_id = $1",
        account_id,
        step,
    )


async def count_failure(tx: Connection, account_id: UUID, locked_until: datetime | None) -> None:
    await tx.execute(
        "UPDATE second_factors SET failures = failures + 1, locked_until = $2 WHERE account_id = $1",
        account_id,
        locked_until,
    )


async def remove(tx: Connection, account_id: UUID) -> None:
    """The second factor and its recovery codes."""
    await tx.execute("DELETE FROM second_factors WHERE account_id = $1", account_id)


async def replace_recovery_codes(tx: Connection, account_id: UUID, digests: Sequence[bytes]) -> None:
    await tx.execute("DELETE FROM recovery_codes WHERE account_id = $1", account_id)
    await tx.execute(
        "INSERT INTO recovery_codes (account_id, digest) SELECT $1, unnest($2::bytea[])",
        account_id,
        list(digests),
    )


async def spend_recovery_code(tx: Connection, account_id: UUID, digest: bytes) -> bool:
    """True if it was one of the account's, and is gone now."""
    status = await tx.execute(
        "DELETE FROM recovery_codes WHERE account_id = $1 AND digest = $2", account_id, digest
    )
    return status == "DELETE 1"


async def state(connection: Connection, account_id: UUID) -> SecondFactorState:
    row = await connection.fetchrow(
        """
        SELECT coalesce((SELECT confirmed_at IS NOT NULL FROM second_factors WHERE account_id = $1), false) AS enabled,
            (SELECT count(*) FROM recovery_codes WHERE account_id = $1) AS codes
        """,
        account_id,
    )
    assert row is not None
    return SecondFactorState(row["enabled"], row["codes"])


async def lock_under_old_keys(
    tx: Connection, data_key_id: str, after: UUID | None, limit: int
) -> list[tuple[UUID, Encrypted]]:
    """Secrets of accounts beyond `after` that are not under `data_key_id`, locked, in order; those in use are passed over."""
    rows = await tx.fetch(
        """
        SELECT account_id, data_key_id, nonce, ciphertext FROM second_factors
        WHERE data_key_id <> $1 AND ($2::uuid IS NULL OR account_id > $2)
        ORDER BY account_id
        LIMIT $3
        FOR UPDATE SKIP LOCKED
        """,
        data_key_id,
        after,
        limit,
    )
    return [(row["account_id"], Encrypted(*row[1:])) for row in rows]


async def reseal(tx: Connection, account_id: UUID, encrypted: Encrypted) -> None:
    """The same secret under another key."""
    await tx.execute(
        "UPDATE second_factors SET data_key_id = $2, nonce = $3, ciphertext = $4 WHERE account_id = $1",
        account_id,
        encrypted.data_key_id,
        encrypted.nonce,
        encrypted.ciphertext,
    )
