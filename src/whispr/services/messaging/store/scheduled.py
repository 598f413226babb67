"""Scheduled messages: kept until their time, claimed by one node, changed and cancelled by their author."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import asyncpg

from whispr.kit.db import Connection
from whispr.services.messaging.models import ClientIdConflict, Draft, Plan, PlanRef, PlanStatus

_COLUMNS: Final = (
    "id, conversation_id, sender_id, sender_device_id, client_id, message_type, content, content_sha256, signature,"
    " reply_to_id, media_ids, expires_in, expires_from_read, send_at, status, failure, needs, message_id, due_at,"
    " attempts, version, created_at, updated_at"
)
_OF_S: Final = ", ".join(f"s.{column.strip()}" for column in _COLUMNS.split(","))


def _plan(record: Any) -> Plan:
    return Plan(
        id=record["id"],
        draft=Draft(
            conversation_id=record["conversation_id"],
            sender_id=record["sender_id"],
            sender_device_id=record["sender_device_id"],
            client_id=record["client_id"],
            message_type=record["message_type"],
            content=record["content"],
            signature=record["signature"],
            reply_to_id=record["reply_to_id"],
            media_ids=tuple(record["media_ids"] or ()),
            expires_in=record["expires_in"],
            expires_from_read=record["expires_from_read"],
            plan=PlanRef(record["id"], record["version"]),
        ),
        content_sha256=record["content_sha256"],
        send_at=record["send_at"],
        status=PlanStatus(record["status"]),
        failure=record["failure"],
        needs=record["needs"],
        message_id=record["message_id"],
        due_at=record["due_at"],
        attempts=record["attempts"],
        version=record["version"],
        created_at=record["created_at"],
        updated_at=record["updated_at"],
    )


async def lock_person(tx: Connection, user_id: UUID) -> None:
    """One of a person's requests at a time, until the transaction ends: what they have is counted, then added to."""
    await tx.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended('scheduled:' || $1::uuid::text, 0))", user_id
    )


async def count_open(tx: Connection, user_id: UUID) -> int:
    """How many of a person's messages wait to be sent."""
    count: int = await tx.fetchval(
        "SELECT count(*) FROM scheduled_messages WHERE sender_id = $1 AND status IN ('pending', 'needs_reencrypt')",
        user_id,
    )
    return count


async def find(connection: Connection, conversation_id: UUID, user_id: UUID, client_id: UUID) -> Plan | None:
    """What a person scheduled under a client id, on whichever device: another one may have signed it since."""
    record = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM scheduled_messages"
        " WHERE conversation_id = $1 AND sender_id = $2 AND client_id = $3 ORDER BY id LIMIT 1",
        conversation_id,
        user_id,
        client_id,
    )
    return None if record is None else _plan(record)


async def insert(tx: Connection, plan: Plan) -> bool:
    """Keep a new one; False if its client id is taken."""
    draft = plan.draft
    kept = await tx.fetchval(
        f"""
        INSERT INTO scheduled_messages ({_COLUMNS})
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23)
        ON CONFLICT DO NOTHING RETURNING true
        """,
        plan.id,
        draft.conversation_id,
        draft.sender_id,
        draft.sender_device_id,
        draft.client_id,
        draft.message_type,
        draft.content,
        plan.content_sha256,
        draft.signature,
        draft.reply_to_id,
        list(draft.media_ids) or None,
        draft.expires_in,
        draft.expires_from_read,
        plan.send_at,
        plan.status.value,
        plan.failure,
        plan.needs,
        plan.message_id,
        plan.due_at,
        plan.attempts,
        plan.version,
        plan.created_at,
        plan.updated_at,
    )
    return bool(kept)


async def replace(tx: Connection, plan: Plan, version: int) -> bool:
    """Put a changed one in the place of its earlier `version`; False if that is not what is there, or not open.

    Raises `ClientIdConflict` if its client id is taken by something else of the device that signed.
    """
    draft = plan.draft
    try:
        return await _replace(tx, plan, draft, version)
    except asyncpg.UniqueViolationError:
        raise ClientIdConflict from None


async def _replace(tx: Connection, plan: Plan, draft: Draft, version: int) -> bool:
    replaced = await tx.fetchval(
        """
        UPDATE scheduled_messages
        SET sender_device_id = $3, content = $4, content_sha256 = $5, signature = $6, reply_to_id = $7, expires_in = $8,
            expires_from_read = $9, send_at = $10, status = $11, failure = $12, needs = $13, due_at = $14, attempts = $15,
            version = $16, updated_at = $17
        WHERE id = $1 AND version = $2 AND status IN ('pending', 'needs_reencrypt')
        RETURNING true
        """,
        plan.id,
        version,
        draft.sender_device_id,
        draft.content,
        plan.content_sha256,
        draft.signature,
        draft.reply_to_id,
        draft.expires_in,
        draft.expires_from_read,
        plan.send_at,
        plan.status.value,
        plan.failure,
        plan.needs,
        plan.due_at,
        plan.attempts,
        plan.version,
        plan.updated_at,
    )
    return bool(replaced)


async def cancel(tx: Connection, plan_id: UUID, user_id: UUID, now: datetime) -> PlanRef | None:
    """Cancel a person's own one, and forget its content; None if it was not waiting and had not failed."""
    record = await tx.fetchrow(
        """
        UPDATE scheduled_messages
        SET status = 'cancelled', content = '', signature = '', needs = NULL, version = version + 1, updated_at = $3
        WHERE id = $1 AND sender_id = $2 AND status IN ('pending', 'needs_reencrypt', 'failed')
        RETURNING id, version
        """,
        plan_id,
        user_id,
        now,
    )
    return None if record is None else PlanRef(record["id"], record["version"])


async def cancel_all_of(tx: Connection, conversation_id: UUID, user_id: UUID, now: datetime) -> list[PlanRef]:
    """Cancel what a person who leaves a conversation has waiting in it. The transaction holds the conversation."""
    records = await tx.fetch(
        """
        UPDATE scheduled_messages
        SET status = 'cancelled', failure = 'forbidden', content = '', signature = '', needs = NULL,
            version = version + 1, updated_at = $3
        WHERE conversation_id = $1 AND sender_id = $2 AND status IN ('pending', 'needs_reencrypt')
        RETURNING id, version
        """,
        conversation_id,
        user_id,
        now,
    )
    return [PlanRef(record["id"], record["version"]) for record in records]


async def get(connection: Connection, plan_id: UUID) -> Plan | None:
    """One of anybody's."""
    plans = await get_all(connection, [plan_id])
    return plans[0] if plans else None


async def get_all(connection: Connection, plan_ids: Sequence[UUID]) -> list[Plan]:
    """Those that exist, in no order."""
    records = await connection.fetch(
        f"SELECT {_COLUMNS} FROM scheduled_messages WHERE id = ANY($1)", list(plan_ids)
    )
    return [_plan(record) for record in records]


async def page(
    connection: Connection,
    user_id: UUID,
    status: PlanStatus | None,
    after: tuple[datetime, UUID] | None,
    limit: int,
) -> list[Plan]:
    """A person's own ones by the time they are to be sent, after the one at `after`."""
    since, last_id = after or (None, None)
    records = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM scheduled_messages
        WHERE sender_id = $1 AND ($2::text IS NULL OR status = $2)
            AND ($3::timestamptz IS NULL OR (send_at, id) > ($3, $4::uuid))
        ORDER BY send_at, id LIMIT $5
        """,
        user_id,
        None if status is None else status.value,
        since,
        last_id,
        limit,
    )
    return [_plan(record) for record in records]


async def in_need(connection: Connection, user_ids: Sequence[UUID]) -> list[Plan]:
    """What people have to encrypt again, oldest first."""
    records = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM scheduled_messages
        WHERE sender_id = ANY($1) AND status = 'needs_reencrypt' ORDER BY send_at, id
        """,
        list(user_ids),
    )
    return [_plan(record) for record in records]


async def can_be_replied_to(
    connection: Connection, conversation_id: UUID, message_id: UUID, user_id: UUID
) -> bool:
    """Whether the person sees the message in that conversation."""
    found = await connection.fetchval(
        """
        SELECT true FROM messages t
        JOIN conversation_members m ON m.conversation_id = t.conversation_id AND m.user_id = $3 AND m.is_active
        WHERE t.conversation_id = $1 AND t.id = $2 AND t.seq > m.floor_seq
        """,
        conversation_id,
        message_id,
        user_id,
    )
    return bool(found)


# Nothing overtakes: what is earlier in a conversation goes first, also while another node is sending it. Only what
# could not be sent and waits to be tried again, and what waits behind that, holds up nobody but its own author.
_HEAD: Final = """
    s.status = 'pending' AND s.due_at <= $1 AND NOT EXISTS (
        SELECT FROM scheduled_messages e
        WHERE e.conversation_id = s.conversation_id AND e.status = 'pending' AND (e.send_at, e.id) < (s.send_at, s.id)
            AND (e.sender_id = s.sender_id OR NOT EXISTS (
                SELECT FROM scheduled_messages f
                WHERE f.conversation_id = e.conversation_id AND f.sender_id = e.sender_id AND f.status = 'pending'
                    AND f.attempts > 0 AND (f.send_at, f.id) <= (e.send_at, e.id)
            ))
    )
"""


async def claim(connection: Connection, due_by: datetime, until: datetime, limit: int) -> list[Plan]:
    """Take the first due one of some conversations; nobody else gets them before `until`."""
    records = await connection.fetch(
        f"""
        WITH due AS (
            SELECT s.id FROM scheduled_messages s WHERE {_HEAD}
            ORDER BY s.due_at, s.id LIMIT $3 FOR UPDATE SKIP LOCKED
        )
        UPDATE scheduled_messages s SET due_at = $2 FROM due WHERE s.id = due.id
        RETURNING {_OF_S}
        """,
        due_by,
        until,
        limit,
    )
    return [_plan(record) for record in records]


async def claim_in(
    connection: Connection, conversation_id: UUID, due_by: datetime, until: datetime
) -> list[Plan]:
    """`claim` in one conversation."""
    records = await connection.fetch(
        f"""
        WITH due AS (
            SELECT s.id FROM scheduled_messages s WHERE s.conversation_id = $3 AND {_HEAD}
            FOR UPDATE SKIP LOCKED
        )
        UPDATE scheduled_messages s SET due_at = $2 FROM due WHERE s.id = due.id
        RETURNING {_OF_S}
        """,
        due_by,
        until,
        conversation_id,
    )
    return [_plan(record) for record in records]


async def next_due(connection: Connection, after: datetime) -> datetime | None:
    """The earliest time after `after` at which one is due, perhaps behind another one of its conversation."""
    due: datetime | None = await connection.fetchval(
        "SELECT min(due_at) FROM scheduled_messages WHERE status = 'pending' AND due_at > $1", after
    )
    return due


async def postpone(connection: Connection, ref: PlanRef, due_at: datetime) -> None:
    """It could not be sent; try again then."""
    await connection.execute(
        """
        UPDATE scheduled_messages SET due_at = $3, attempts = attempts + 1
        WHERE id = $1 AND version = $2 AND status = 'pending'
        """,
        ref.id,
        ref.version,
        due_at,
    )


async def mark_as_sent(connection: Connection, ref: PlanRef, message_id: UUID, now: datetime) -> None:
    """The message exists already, sent under its client id by somebody else than the plan."""
    await connection.execute(
        """
        UPDATE scheduled_messages
        SET status = 'sent', failure = NULL, message_id = $3, content = '', signature = '', updated_at = $4
        WHERE id = $1 AND version = $2 AND status = 'pending'
        """,
        ref.id,
        ref.version,
        message_id,
        now,
    )


async def settle(
    connection: Connection,
    ref: PlanRef,
    status: PlanStatus,
    failure: str,
    needs: dict[str, Any] | None,
    now: datetime,
) -> bool:
    """Put down why it cannot be sent; False if it was changed meanwhile."""
    settled = await connection.fetchval(
        """
        UPDATE scheduled_messages SET status = $3, failure = $4, needs = $5, updated_at = $6
        WHERE id = $1 AND version = $2 AND status = 'pending'
        RETURNING true
        """,
        ref.id,
        ref.version,
        status.value,
        failure,
        needs,
        now,
    )
    return bool(settled)


async def forget(connection: Connection, before: datetime, limit: int) -> int:
    """Drop some of those that ended before then; how many."""
    tag = await connection.execute(
        """
        DELETE FROM scheduled_messages WHERE id IN (
            SELECT id FROM scheduled_messages
            WHERE status IN ('sent', 'failed', 'cancelled') AND updated_at < $1 LIMIT $2
        )
        """,
        before,
        limit,
    )
    return int(tag.split()[-1])
