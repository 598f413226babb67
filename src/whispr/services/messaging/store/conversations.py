"""Conversations and the log of their events that are not messages."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from whispr.kit.db import Connection
from whispr.services.messaging.models import CommittedEvent, ConversationRow, ConversationType, Permissions

_COLUMNS = (
    "id, type, metadata, is_active, created_by, last_seq, created_at, updated_at, permissions, retention_seconds,"
    " purged_seq"
)


def _row(record: Any) -> ConversationRow:
    conversation_type = ConversationType(record["type"])
    return ConversationRow(
        id=record["id"],
        type=conversation_type,
        metadata=record["metadata"],
        is_active=record["is_active"],
        created_by=record["created_by"],
        last_seq=record["last_seq"],
        created_at=record["created_at"],
        updated_at=record["updated_at"],
        permissions=Permissions.of(conversation_type, record["permissions"]),
        retention_seconds=record["retention_seconds"],
        purged_seq=record["purged_seq"],
    )


async def read_epoch(connection: Connection) -> UUID:
    """The id of this database's incarnation; a cursor of another one means nothing here."""
    epoch: UUID = await connection.fetchval("SELECT epoch FROM incarnation")
    return epoch


async def insert(
    tx: Connection,
    conversation_id: UUID,
    conversation_type: ConversationType,
    created_by: UUID,
    metadata: dict[str, Any],
    now: datetime,
    *,
    direct_key: str | None = None,
    creation_key: str | None = None,
    creation_digest: bytes | None = None,
) -> bool:
    """Create a conversation; False if one with the same direct or creation key exists.

    Waits for a concurrent creation with the same key to commit, so that the loser can read the winner's row.
    """
    created = await tx.fetchval(
        """
        INSERT INTO conversations
            (id, type, metadata, created_by, direct_key, creation_key, creation_digest, created_at, updated_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8)
        ON CONFLICT DO NOTHING
        RETURNING true
        """,
        conversation_id,
        conversation_type.value,
        metadata,
        created_by,
        direct_key,
        creation_key,
        creation_digest,
        now,
    )
    return bool(created)


async def find_direct(connection: Connection, direct_key: str) -> UUID | None:
    """The direct conversation of two people, by their sorted ids."""
    found: UUID | None = await connection.fetchval(
        "SELECT id FROM conversations WHERE direct_key = $1", direct_key
    )
    return found


async def find_created(connection: Connection, creation_key: str) -> tuple[UUID, bytes] | None:
    """The conversation made with a person's Idempotency-Key, and the digest of what was asked then."""
    record = await connection.fetchrow(
        "SELECT id, creation_digest FROM conversations WHERE creation_key = $1", creation_key
    )
    return (record["id"], record["creation_digest"]) if record else None


async def get(connection: Connection, conversation_id: UUID) -> ConversationRow | None:
    """One conversation."""
    record = await connection.fetchrow(f"SELECT {_COLUMNS} FROM conversations WHERE id = $1", conversation_id)
    return _row(record) if record else None


async def lock(tx: Connection, conversation_id: UUID) -> ConversationRow | None:
    """One conversation, held until the transaction ends: whoever appends to its log or changes its members waits."""
    record = await tx.fetchrow(
        f"SELECT {_COLUMNS} FROM conversations WHERE id = $1 FOR UPDATE", conversation_id
    )
    return _row(record) if record else None


async def heads(connection: Connection, conversation_ids: Sequence[UUID]) -> dict[UUID, int]:
    """The `seq` of the newest event of each conversation."""
    records = await connection.fetch(
        "SELECT id, last_seq FROM conversations WHERE id = ANY($1)", list(conversation_ids)
    )
    return {record["id"]: record["last_seq"] for record in records}


async def purged_until(connection: Connection, conversation_id: UUID) -> int:
    """The `seq` of the last event that was removed for ever, 0 if none was."""
    until: int | None = await connection.fetchval(
        "SELECT purged_seq FROM conversations WHERE id = $1", conversation_id
    )
    return until or 0


async def update_metadata(tx: Connection, conversation_id: UUID, metadata: dict[str, Any]) -> None:
    """Replace the metadata; its event sets the time of the change."""
    await tx.execute("UPDATE conversations SET metadata = $2 WHERE id = $1", conversation_id, metadata)


async def set_permissions(tx: Connection, conversation_id: UUID, permissions: Permissions) -> None:
    """Replace the permissions; their event sets the time of the change."""
    await tx.execute(
        "UPDATE conversations SET permissions = $2 WHERE id = $1",
        conversation_id,
        msgspec.to_builtins(permissions),
    )


async def close(tx: Connection, conversation_id: UUID) -> None:
    """No more sends; its event sets the time of the change."""
    await tx.execute("UPDATE conversations SET is_active = false WHERE id = $1", conversation_id)


async def append_event(
    tx: Connection, conversation_id: UUID, event: str, payload: dict[str, Any], now: datetime
) -> CommittedEvent:
    """Append one event, its `seq` first in the payload. Publish what it returns after the commit."""
    return (await append_events(tx, conversation_id, [(event, payload)], now))[0]


async def append_events(
    tx: Connection, conversation_id: UUID, events: Sequence[tuple[str, dict[str, Any]]], now: datetime
) -> list[CommittedEvent]:
    """Append events in order with the next dense numbers. Publish what it returns after the commit."""
    last = await tx.fetchval(
        "UPDATE conversations SET last_seq = last_seq + $2, updated_at = $3 WHERE id = $1 RETURNING last_seq",
        conversation_id,
        len(events),
        now,
    )
    appended = [
        CommittedEvent(conversation_id, seq, event, msgspec.json.encode({"seq": seq, **payload}))
        for seq, (event, payload) in enumerate(events, last - len(events) + 1)
    ]
    await tx.execute(
        """
        INSERT INTO conversation_events (conversation_id, seq, event, payload, created_at)
        SELECT $1, e.seq, e.event, e.payload, $5
        FROM unnest($2::bigint[], $3::text[], $4::bytea[]) AS e (seq, event, payload)
        """,
        conversation_id,
        [item.seq for item in appended],
        [item.event for item in appended],
        [item.payload for item in appended],
        now,
    )
    return appended
