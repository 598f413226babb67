"""What devices ask when they come: each statement answers many at once, for a node that starts is asked by all of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.messaging.models import MemberId, Membership, MemberView, Role


async def memberships(
    connection: Connection, asked: Sequence[tuple[UUID, UUID]]
) -> list[tuple[Membership, int] | None]:
    """For each (conversation, person) the active membership and the `seq` of the newest event; None for strangers."""
    records = await connection.fetch(
        """
        SELECT asked.number, m.role, GREATEST(m.floor_seq, c.purged_seq) AS floor_seq, c.last_seq
        FROM unnest($1::uuid[], $2::uuid[]) WITH ORDINALITY AS asked (conversation_id, user_id, number)
        JOIN conversations c ON c.id = asked.conversation_id
        CROSS JOIN LATERAL (
            -- The limit keeps the planner from walking through everything a person is a member of.
            SELECT role, floor_seq, is_active FROM conversation_members
            WHERE conversation_id = asked.conversation_id AND user_id = asked.user_id LIMIT 1
        ) AS m
        WHERE m.is_active
        """,
        [conversation_id for conversation_id, _ in asked],
        [user_id for _, user_id in asked],
    )
    found: list[tuple[Membership, int] | None] = [None] * len(asked)
    for record in records:
        conversation_id, user_id = asked[record["number"] - 1]
        membership = Membership(conversation_id, MemberId(user_id), Role(record["role"]), record["floor_seq"])
        found[record["number"] - 1] = membership, record["last_seq"]
    return found


async def small_rooms(
    connection: Connection, conversation_ids: Collection[UUID], size: int
) -> dict[UUID, list[MemberView]]:
    """The active members, longest in first, of those conversations that have at most `size`."""
    records = await connection.fetch(
        """
        SELECT m.* FROM unnest($1::uuid[]) AS asked (id)
        CROSS JOIN LATERAL (
            SELECT conversation_id, user_id, role, joined_at, delivered_seq, read_seq FROM conversation_members
            WHERE conversation_id = asked.id AND is_active ORDER BY joined_at, floor_seq, user_id LIMIT $2 + 1
        ) AS m
        """,
        list(conversation_ids),
        size,
    )
    rooms: dict[UUID, list[MemberView]] = {}
    for record in records:
        rooms.setdefault(record["conversation_id"], []).append(_member(record))
    return {conversation_id: members for conversation_id, members in rooms.items() if len(members) <= size}


def _member(record: Any) -> MemberView:
    return MemberView(
        record["user_id"],
        Role(record["role"]),
        record["joined_at"],
        record["delivered_seq"],
        record["read_seq"],
    )


async def undelivered_heads(
    connection: Connection, asked: Sequence[tuple[UUID, UUID, UUID]], new_device_window: int, limit: int
) -> list[list[tuple[UUID, int, int, bool]]]:
    """For each (person, device, after): conversations with events the device has not acknowledged.

    Each as id, last acknowledged `seq`, head, truncated; up to `limit` in the order of their ids, from `after`. A device
    without a cursor starts `new_device_window` events back; what was purged counts as acknowledged and is truncated.
    """
    records = await connection.fetch(
        """
        SELECT asked.number, behind.*
        FROM unnest($1::uuid[], $2::uuid[], $3::uuid[]) WITH ORDINALITY AS asked (user_id, device_id, after, number)
        CROSS JOIN LATERAL (
            SELECT c.id, c.last_seq,
                   GREATEST(m.floor_seq, c.purged_seq, COALESCE(d.delivered_seq, c.last_seq - $4)) AS from_seq,
                   CASE WHEN d.delivered_seq IS NULL THEN GREATEST(c.last_seq - $4, c.purged_seq) > m.floor_seq
                        ELSE c.purged_seq > GREATEST(m.floor_seq, d.delivered_seq) END AS truncated
            FROM conversation_members m
            JOIN conversations c ON c.id = m.conversation_id
            LEFT JOIN device_cursors d ON d.device_id = asked.device_id AND d.conversation_id = c.id
            WHERE m.user_id = asked.user_id AND m.is_active AND c.id > asked.after
              AND c.last_seq > GREATEST(m.floor_seq, c.purged_seq, COALESCE(d.delivered_seq, c.last_seq - $4))
            ORDER BY c.id LIMIT $5
        ) AS behind
        """,
        [user_id for user_id, _, _ in asked],
        [device_id for _, device_id, _ in asked],
        [after for _, _, after in asked],
        new_device_window,
        limit,
    )
    found: list[list[tuple[UUID, int, int, bool]]] = [[] for _ in asked]
    for record in records:
        found[record["number"] - 1].append(
            (record["id"], record["from_seq"], record["last_seq"], record["truncated"])
        )
    return found
