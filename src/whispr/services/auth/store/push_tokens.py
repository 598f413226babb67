"""Statements on push tokens, which are encrypted before they get here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.auth.models import Encrypted, NewPushToken, PushChannel, SealedPushToken, TokenPlace

_SELECT = """
    SELECT p.device_id, d.account_id, d.platform, p.channel, p.app_id, p.environment, p.data_key_id, p.nonce,
        p.ciphertext, p.updated_at, a.device_list_epoch
    FROM push_tokens p JOIN devices d ON d.id = p.device_id JOIN accounts a ON a.id = d.account_id
"""


async def put(
    tx: Connection,
    device_id: UUID,
    token: NewPushToken,
    encrypted: Encrypted,
    digest: bytes,
    now: datetime,
) -> None:
    """Replace the device's token of this channel and app. The same token leaves any other device that had it.

    A phone that changed hands or accounts keeps its token: left with the old device it would show a stranger's pushes.
    """
    await tx.execute(
        """
        DELETE FROM push_tokens
        WHERE channel = $1 AND token_digest = $2 AND (device_id, app_id) IS DISTINCT FROM ($3::uuid, $4::text)
        """,
        token.channel,
        digest,
        device_id,
        token.app_id,
    )
    await tx.execute(
        """
        INSERT INTO push_tokens
            (device_id, channel, app_id, environment, data_key_id, nonce, ciphertext, token_digest, updated_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
        ON CONFLICT (device_id, channel, app_id) DO UPDATE
        SET environment = excluded.environment, data_key_id = excluded.data_key_id, nonce = excluded.nonce,
            ciphertext = excluded.ciphertext, token_digest = excluded.token_digest, status = 'active',
            updated_at = excluded.updated_at
        """,
        device_id,
        token.channel,
        token.app_id,
        token.environment,
        encrypted.data_key_id,
        encrypted.nonce,
        encrypted.ciphertext,
        digest,
        now,
    )


async def remove(tx: Connection, device_id: UUID) -> bool:
    """Remove every token of the device; True if there was one."""
    return await tx.execute("DELETE FROM push_tokens WHERE device_id = $1", device_id) != "DELETE 0"


async def active(
    connection: Connection, account_ids: Sequence[UUID], device_ids: Sequence[UUID]
) -> list[SealedPushToken]:
    """Working tokens of active devices, by account or by device."""
    rows = await connection.fetch(
        f"""
        {_SELECT}
        WHERE p.status = 'active' AND d.status = 'active'
            AND (d.account_id = ANY($1::uuid[]) OR d.id = ANY($2::uuid[]))
        ORDER BY d.account_id, d.id, p.channel, p.app_id
        """,
        list(account_ids),
        list(device_ids),
    )
    return [SealedPushToken(*row) for row in rows]


async def drop_dead(tx: Connection, device_id: UUID, channel: PushChannel, token_time: datetime) -> int:
    """Remove tokens no newer than `token_time`; how many."""
    status = await tx.execute(
        "DELETE FROM push_tokens WHERE device_id = $1 AND channel = $2 AND updated_at <= $3",
        device_id,
        channel,
        token_time,
    )
    return int(status.rsplit(" ", 1)[1])


async def set_status(
    tx: Connection, device_id: UUID, channel: PushChannel, token_time: datetime, status: str
) -> int:
    """Mark tokens no newer than `token_time` as `active` or `inactive`; how many changed."""
    answer = await tx.execute(
        """
        UPDATE push_tokens SET status = $4
        WHERE device_id = $1 AND channel = $2 AND updated_at <= $3 AND status <> $4
        """,
        device_id,
        channel,
        token_time,
        status,
    )
    return int(answer.rsplit(" ", 1)[1])


async def lock_under_old_keys(
    tx: Connection, data_key_id: str, after: TokenPlace | None, limit: int
) -> list[SealedPushToken]:
    """Tokens beyond `after` that are not under `data_key_id`, locked, in order.

    Those another transaction is changing are passed over: they come under the newest key by that, or another time.
    """
    device_id, channel, app_id = after or (None, None, None)
    rows = await tx.fetch(
        f"""
        {_SELECT}
        WHERE p.data_key_id <> $1
            AND ($2::uuid IS NULL OR (p.device_id, p.channel, p.app_id) > ($2::uuid, $3::text, $4::text))
        ORDER BY p.device_id, p.channel, p.app_id
        LIMIT $5
        FOR UPDATE OF p SKIP LOCKED
        """,
        data_key_id,
        device_id,
        channel,
        app_id,
        limit,
    )
    return [SealedPushToken(*row) for row in rows]


async def reseal(tx: Connection, token: SealedPushToken, encrypted: Encrypted) -> None:
    """The same token under another key; its time of change stays, because nothing changed for the push service."""
    await tx.execute(
        """
        UPDATE push_tokens SET data_key_id = $4, nonce = $5, ciphertext = $6
        WHERE device_id = $1 AND channel = $2 AND app_id = $3
        """,
        token.device_id,
        token.channel,
        token.app_id,
        encrypted.data_key_id,
        encrypted.nonce,
        encrypted.ciphertext,
    )


async def rows_per_key(connection: Connection) -> dict[str, int]:
    """How many tokens lie under each data key, keys without any included."""
    rows = await connection.fetch(
        """
        SELECT k.id, count(p.device_id) AS n
        FROM data_keys k LEFT JOIN push_tokens p ON p.data_key_id = k.id
        GROUP BY k.id
        """
    )
    return {row["id"]: row["n"] for row in rows}


async def lock_token(tx: Connection, digest: bytes) -> None:
    """Registrations of one token go one after the other, or two devices could both hold it."""
    await tx.execute("SELECT pg_advisory_xact_lock($1)", int.from_bytes(digest[:8], "big", signed=True))
