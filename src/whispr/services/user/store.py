"""Every SQL statement of the user service, one function each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from asyncpg import Record

from whispr.kit.db import Connection
from whispr.services.user.models import (
    Account,
    Position,
    Privacy,
    Profile,
    RelatedProfile,
    Reservation,
    ReservationState,
    State,
    StorageUsage,
)

_PROFILE = """
    p.user_id, p.username, p.display_name, p.avatar_media_id, p.locale, p.time_zone, p.privacy,
    p.created_at, p.updated_at
"""


def _relation_to(viewer: str) -> str:
    return f"""
    EXISTS (SELECT FROM contacts c WHERE c.owner_id = {viewer} AND c.user_id = p.user_id) AS is_contact,
    EXISTS (SELECT FROM contacts c WHERE c.owner_id = p.user_id AND c.user_id = {viewer}) AS knows_viewer,
    EXISTS (SELECT FROM blocks b WHERE b.owner_id = {viewer} AND b.user_id = p.user_id) AS is_blocked,
    EXISTS (SELECT FROM blocks b WHERE b.owner_id = p.user_id AND b.user_id = {viewer}) AS blocks_viewer
"""


_RELATION = _relation_to("$1")


def _profile(row: Record) -> Profile:
    return Profile(
        user_id=row["user_id"],
        username=row["username"],
        display_name=row["display_name"],
        avatar_media_id=row["avatar_media_id"],
        locale=row["locale"],
        time_zone=row["time_zone"],
        privacy=Privacy.from_stored(row["privacy"]),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


def _related(row: Record) -> RelatedProfile:
    return RelatedProfile(
        profile=_profile(row),
        is_contact=row["is_contact"],
        knows_viewer=row["knows_viewer"],
        is_blocked=row["is_blocked"],
        blocks_viewer=row["blocks_viewer"],
    )


# Profiles


async def seen_ids(conn: Connection, user_ids: Sequence[UUID]) -> set[UUID]:
    """Those of `user_ids` that have a row, tombstones included."""
    rows = await conn.fetch("SELECT user_id FROM profiles WHERE user_id = ANY($1::uuid[])", user_ids)
    return {row["user_id"] for row in rows}


async def create_profiles(conn: Connection, accounts: Sequence[Account], now: datetime) -> None:
    """Start a profile for each account that has no row; a tombstone stays what it is."""
    await conn.execute(
        """
        INSERT INTO profiles (user_id, username, created_at, updated_at, last_active_at)
        SELECT a.user_id, a.username, a.created_at, $4, $4
        FROM unnest($1::uuid[], $2::text[], $3::timestamptz[]) AS a (user_id, username, created_at)
        ORDER BY a.user_id
        ON CONFLICT (user_id) DO NOTHING
        """,
        [account.user_id for account in accounts],
        [account.username for account in accounts],
        [account.created_at for account in accounts],
        now,
    )


async def profile(conn: Connection, user_id: UUID) -> Profile | None:
    row = await conn.fetchrow(
        f"SELECT {_PROFILE} FROM profiles p WHERE p.user_id = $1 AND p.state <> 'erased'", user_id
    )
    return _profile(row) if row else None


async def profiles(conn: Connection, user_ids: Sequence[UUID]) -> list[Profile]:
    rows = await conn.fetch(
        f"SELECT {_PROFILE} FROM profiles p WHERE p.user_id = ANY($1::uuid[]) AND p.state <> 'erased'",
        user_ids,
    )
    return [_profile(row) for row in rows]


async def user_id_of(conn: Connection, username: str) -> UUID | None:
    """The person of that name; the latest account where a deleted one has not been erased here yet."""
    value = await conn.fetchval(
        "SELECT user_id FROM profiles WHERE username = $1 ORDER BY created_at DESC LIMIT 1", username
    )
    return value if isinstance(value, UUID) else None


async def related_pairs(conn: Connection, pairs: Sequence[tuple[UUID, UUID]]) -> list[RelatedProfile | None]:
    """For each (viewer, subject) the subject as it stands to the viewer; None where there is no such living person."""
    rows = await conn.fetch(
        f"""
        SELECT asked.number, {_PROFILE}, {_relation_to("asked.viewer_id")}
        FROM unnest($1::uuid[], $2::uuid[]) WITH ORDINALITY AS asked (viewer_id, subject_id, number)
        JOIN profiles p ON p.user_id = asked.subject_id AND p.state <> 'erased'
        """,
        [viewer_id for viewer_id, _ in pairs],
        [subject_id for _, subject_id in pairs],
    )
    found: list[RelatedProfile | None] = [None] * len(pairs)
    for row in rows:
        found[row["number"] - 1] = _related(row)
    return found


async def lock_profiles(conn: Connection, user_ids: Sequence[UUID]) -> dict[UUID, State]:
    """Lock the rows in the order of their ids, so that two people acting on each other cannot deadlock."""
    rows = await conn.fetch(
        """
        SELECT user_id, state FROM profiles WHERE user_id = ANY($1::uuid[])
        ORDER BY user_id FOR NO KEY UPDATE
        """,
        user_ids,
    )
    return {row["user_id"]: row["state"] for row in rows}


async def update_profile(
    conn: Connection, user_id: UUID, values: Mapping[str, Any], privacy: Mapping[str, Any], now: datetime
) -> Profile | None:
    """Set the columns named in `values` (of the four below) and lay `privacy` over the stored choices."""
    row = await conn.fetchrow(
        f"""
        UPDATE profiles p SET
            display_name = CASE WHEN $2::jsonb ? 'display_name' THEN $2 ->> 'display_name' ELSE display_name END,
            avatar_media_id = CASE WHEN $2 ? 'avatar_media_id'
                THEN ($2 ->> 'avatar_media_id')::uuid ELSE avatar_media_id END,
            locale = CASE WHEN $2 ? 'locale' THEN $2 ->> 'locale' ELSE locale END,
            time_zone = CASE WHEN $2 ? 'time_zone' THEN $2 ->> 'time_zone' ELSE time_zone END,
            privacy = privacy || $3::jsonb,
            updated_at = $4
        WHERE user_id = $1 AND state <> 'erased'
        RETURNING {_PROFILE}
        """,
        user_id,
        dict(values),
        dict(privacy),
        now,
    )
    return _profile(row) if row else None


async def touch(conn: Connection, user_ids: Sequence[UUID], now: datetime, unless_since: datetime) -> None:
    """Note that the people are there; no write where that was noted after `unless_since`.

    A row that somebody else holds is left: two such calls must not wait for each other in opposite orders.
    """
    await conn.execute(
        """
        UPDATE profiles p SET last_active_at = $2, state = 'active'
        FROM (
            SELECT user_id FROM profiles
            WHERE user_id = ANY($1::uuid[]) AND (state = 'dormant' OR state = 'active' AND last_active_at < $3)
            FOR NO KEY UPDATE SKIP LOCKED
        ) AS due
        WHERE p.user_id = due.user_id
        """,
        user_ids,
        now,
        unless_since,
    )


async def bury(conn: Connection, user_id: UUID, now: datetime) -> None:
    """Leave a tombstone in place of the profile, also where there was none."""
    await conn.execute(
        """
        INSERT INTO profiles (user_id, state, created_at, updated_at, last_active_at)
        VALUES ($1, 'erased', $2, $2, $2)
        ON CONFLICT (user_id) DO UPDATE SET
            state = 'erased', username = NULL, display_name = NULL, avatar_media_id = NULL, locale = 'en',
            time_zone = 'UTC', privacy = '{}', created_at = $2, updated_at = $2, last_active_at = $2
        WHERE profiles.state <> 'erased'
        """,
        user_id,
        now,
    )


async def delete_belongings(conn: Connection, user_id: UUID) -> None:
    """Delete the person's relations, in both directions, reservations and quotas."""
    await conn.execute("DELETE FROM contacts WHERE owner_id = $1 OR user_id = $1", user_id)
    await conn.execute("DELETE FROM blocks WHERE owner_id = $1 OR user_id = $1", user_id)
    await conn.execute("DELETE FROM storage_reservations WHERE user_id = $1", user_id)
    await conn.execute("DELETE FROM quotas WHERE user_id = $1", user_id)


# Contacts and blocks


async def add_contact(conn: Connection, owner_id: UUID, user_id: UUID, now: datetime) -> bool:
    """Whether the contact is new."""
    done = await conn.execute(
        "INSERT INTO contacts (owner_id, user_id, created_at) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        owner_id,
        user_id,
        now,
    )
    return done != "INSERT 0 0"


async def remove_contact(conn: Connection, owner_id: UUID, user_id: UUID) -> bool:
    """Whether there was one."""
    done = await conn.execute("DELETE FROM contacts WHERE owner_id = $1 AND user_id = $2", owner_id, user_id)
    return done != "DELETE 0"


async def add_block(conn: Connection, owner_id: UUID, user_id: UUID, now: datetime) -> bool:
    """Whether the block is new."""
    done = await conn.execute(
        "INSERT INTO blocks (owner_id, user_id, created_at) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        owner_id,
        user_id,
        now,
    )
    return done != "INSERT 0 0"


async def remove_block(conn: Connection, owner_id: UUID, user_id: UUID) -> bool:
    """Whether there was one."""
    done = await conn.execute("DELETE FROM blocks WHERE owner_id = $1 AND user_id = $2", owner_id, user_id)
    return done != "DELETE 0"


async def is_blocked(conn: Connection, owner_id: UUID, user_id: UUID) -> bool:
    """Whether `owner_id` blocks `user_id`."""
    found = await conn.fetchval(
        "SELECT 1 FROM blocks WHERE owner_id = $1 AND user_id = $2", owner_id, user_id
    )
    return found is not None


async def count_contacts(conn: Connection, owner_id: UUID) -> int:
    return int(await conn.fetchval("SELECT count(*) FROM contacts WHERE owner_id = $1", owner_id))


async def count_blocks(conn: Connection, owner_id: UUID) -> int:
    return int(await conn.fetchval("SELECT count(*) FROM blocks WHERE owner_id = $1", owner_id))


async def contacts_of(conn: Connection, owner_ids: Sequence[UUID]) -> dict[UUID, list[UUID]]:
    """The contacts of those who have any."""
    rows = await conn.fetch(
        "SELECT owner_id, user_id FROM contacts WHERE owner_id = ANY($1::uuid[])", owner_ids
    )
    contacts: dict[UUID, list[UUID]] = {}
    for row in rows:
        contacts.setdefault(row["owner_id"], []).append(row["user_id"])
    return contacts


async def contacts_after(
    conn: Connection, owner_id: UUID, after: Position | None, limit: int
) -> list[tuple[RelatedProfile, datetime]]:
    """A page of contacts in the order of adding."""
    rows = await conn.fetch(
        f"""
        SELECT {_PROFILE}, {_RELATION}, r.created_at AS related_at
        FROM contacts r JOIN profiles p ON p.user_id = r.user_id
        WHERE r.owner_id = $1 AND ($2::timestamptz IS NULL OR (r.created_at, r.user_id) > ($2, $3::uuid))
        ORDER BY r.created_at, r.user_id LIMIT $4
        """,
        owner_id,
        after.created_at if after else None,
        after.user_id if after else None,
        limit,
    )
    return [(_related(row), row["related_at"]) for row in rows]


async def blocks_after(
    conn: Connection, owner_id: UUID, after: Position | None, limit: int
) -> list[tuple[RelatedProfile, datetime]]:
    """A page of blocks in the order of adding."""
    rows = await conn.fetch(
        f"""
        SELECT {_PROFILE}, {_RELATION}, r.created_at AS related_at
        FROM blocks r JOIN profiles p ON p.user_id = r.user_id
        WHERE r.owner_id = $1 AND ($2::timestamptz IS NULL OR (r.created_at, r.user_id) > ($2, $3::uuid))
        ORDER BY r.created_at, r.user_id LIMIT $4
        """,
        owner_id,
        after.created_at if after else None,
        after.user_id if after else None,
        limit,
    )
    return [(_related(row), row["related_at"]) for row in rows]


# Storage


async def storage_usage(conn: Connection, user_id: UUID, default_limit: int) -> StorageUsage:
    row = await conn.fetchrow(
        """
        SELECT coalesce(storage_limit_bytes, $2) AS "limit", storage_used_bytes AS used,
            storage_reserved_bytes AS reserved
        FROM quotas WHERE user_id = $1
        """,
        user_id,
        default_limit,
    )
    return StorageUsage(**row) if row else StorageUsage(limit=default_limit, used=0, reserved=0)


async def lock_storage_usage(conn: Connection, user_id: UUID, default_limit: int) -> StorageUsage:
    """The person's counters, made where they have none, locked until the transaction ends."""
    await conn.execute("INSERT INTO quotas (user_id) VALUES ($1) ON CONFLICT DO NOTHING", user_id)
    await conn.execute("SELECT FROM quotas WHERE user_id = $1 FOR NO KEY UPDATE", user_id)
    return await storage_usage(conn, user_id, default_limit)


async def set_storage_usage(conn: Connection, user_id: UUID, usage: StorageUsage) -> None:
    """Write the counters; the caller holds them locked."""
    await conn.execute(
        "UPDATE quotas SET storage_used_bytes = $2, storage_reserved_bytes = $3 WHERE user_id = $1",
        user_id,
        usage.used,
        usage.reserved,
    )


async def set_storage_limit(conn: Connection, user_id: UUID, limit: int | None) -> None:
    """Give a person a limit of their own; None returns to the one of the settings."""
    await conn.execute(
        """
        INSERT INTO quotas (user_id, storage_limit_bytes) VALUES ($1, $2)
        ON CONFLICT (user_id) DO UPDATE SET storage_limit_bytes = excluded.storage_limit_bytes
        """,
        user_id,
        limit,
    )


async def lock_reservation(conn: Connection, reservation_id: UUID) -> Reservation | None:
    row = await conn.fetchrow(
        """
        SELECT reservation_id, user_id, bytes, state FROM storage_reservations
        WHERE reservation_id = $1 FOR NO KEY UPDATE
        """,
        reservation_id,
    )
    return Reservation(**row) if row else None


async def add_reservation(
    conn: Connection, reservation: Reservation, now: datetime, expires_at: datetime
) -> bool:
    """False where the id is taken."""
    done = await conn.execute(
        """
        INSERT INTO storage_reservations (reservation_id, user_id, bytes, state, expires_at, updated_at)
        VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING
        """,
        reservation.reservation_id,
        reservation.user_id,
        reservation.bytes,
        reservation.state,
        expires_at,
        now,
    )
    return done != "INSERT 0 0"


async def settle_reservation(
    conn: Connection, reservation_id: UUID, state: ReservationState, now: datetime
) -> None:
    await conn.execute(
        "UPDATE storage_reservations SET state = $2, updated_at = $3 WHERE reservation_id = $1",
        reservation_id,
        state,
        now,
    )


async def expire_reservations(conn: Connection, now: datetime, limit: int) -> int:
    """Give back what reservations past their time hold; how many there were.

    Rows held by a commit or release under way are left to it. The advisory lock keeps two replicas from updating the
    counters of the same people in different orders.
    """
    await conn.execute("SELECT pg_advisory_xact_lock(hashtextextended('user.expire_reservations', 0))")
    return int(
        await conn.fetchval(
            """
            WITH due AS (
                SELECT reservation_id FROM storage_reservations
                WHERE state = 'reserved' AND expires_at <= $1
                ORDER BY expires_at LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED
            ), expired AS (
                UPDATE storage_reservations r SET state = 'expired', updated_at = $1
                FROM due WHERE r.reservation_id = due.reservation_id RETURNING r.user_id, r.bytes
            ), freed AS (
                SELECT user_id, sum(bytes) AS bytes FROM expired GROUP BY user_id
            ), settled AS (
                UPDATE quotas q SET storage_reserved_bytes = q.storage_reserved_bytes - freed.bytes
                FROM freed WHERE q.user_id = freed.user_id
            )
            SELECT count(*) FROM expired
            """,
            now,
            limit,
        )
    )


# Operations that may be repeated


async def begin_operation(
    conn: Connection, operation_id: UUID, request: Mapping[str, Any], now: datetime
) -> bool:
    """Claim the id for this transaction, waiting for one that is claiming it now; False where it is taken."""
    done = await conn.execute(
        "INSERT INTO operations (operation_id, request, created_at) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        operation_id,
        dict(request),
        now,
    )
    return done != "INSERT 0 0"


async def finish_operation(conn: Connection, operation_id: UUID, response: Mapping[str, Any]) -> None:
    await conn.execute(
        "UPDATE operations SET response = $2 WHERE operation_id = $1", operation_id, dict(response)
    )


async def operation(conn: Connection, operation_id: UUID) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The request and the response of a finished operation."""
    row = await conn.fetchrow(
        "SELECT request, response FROM operations WHERE operation_id = $1", operation_id
    )
    return (row["request"], row["response"]) if row else None


async def delete_old_operations(conn: Connection, before: datetime) -> int:
    done = await conn.execute("DELETE FROM operations WHERE created_at < $1", before)
    return int(done.rpartition(" ")[2])


async def delete_settled_reservations(conn: Connection, before: datetime) -> int:
    done = await conn.execute(
        "DELETE FROM storage_reservations WHERE state <> 'reserved' AND updated_at < $1", before
    )
    return int(done.rpartition(" ")[2])


# Reports and upkeep


async def count_profiles(conn: Connection, start: datetime, end: datetime) -> dict[str, int]:
    row = await conn.fetchrow(
        """
        SELECT
            count(*) FILTER (WHERE state <> 'erased') AS total,
            count(*) FILTER (WHERE state = 'dormant') AS dormant,
            count(*) FILTER (WHERE state <> 'erased' AND created_at >= $1 AND created_at < $2) AS created,
            count(*) FILTER (WHERE state = 'active' AND last_active_at >= $1 AND last_active_at < $2) AS last_active,
            count(*) FILTER (WHERE state = 'erased' AND updated_at >= $1 AND updated_at < $2) AS erased
        FROM profiles
        """,
        start,
        end,
    )
    return dict(row) if row else {}


async def count_relations(conn: Connection) -> dict[str, tuple[int, int]]:
    """For contacts and blocks: how many entries, and how many people have any."""
    row = await conn.fetchrow(
        """
        SELECT
            (SELECT (count(*), count(DISTINCT owner_id)) FROM contacts) AS contacts,
            (SELECT (count(*), count(DISTINCT owner_id)) FROM blocks) AS blocks
        """
    )
    return {name: tuple(value) for name, value in row.items()} if row else {}


async def sum_storage(conn: Connection) -> dict[str, int]:
    row = await conn.fetchrow(
        """
        SELECT count(*) FILTER (WHERE storage_used_bytes > 0) AS people,
            coalesce(sum(storage_used_bytes), 0)::bigint AS used_bytes,
            coalesce(sum(storage_reserved_bytes), 0)::bigint AS reserved_bytes
        FROM quotas
        """
    )
    return dict(row) if row else {}


async def count_locales(conn: Connection) -> list[tuple[str, int]]:
    rows = await conn.fetch(
        "SELECT locale, count(*) AS people FROM profiles WHERE state <> 'erased' GROUP BY locale"
    )
    return [(row["locale"], row["people"]) for row in rows]


async def inactive_ids(conn: Connection, inactive_since: datetime, limit: int) -> list[UUID]:
    """The longest absent first; locked, and those in use at this moment left out."""
    rows = await conn.fetch(
        """
        SELECT user_id FROM profiles WHERE state = 'active' AND last_active_at < $1
        ORDER BY last_active_at, user_id LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED
        """,
        inactive_since,
        limit,
    )
    return [row["user_id"] for row in rows]


async def put_to_rest(conn: Connection, user_ids: Sequence[UUID], now: datetime) -> None:
    """Forget what the people said of themselves and whom they know.

    Privacy and blocks stay: should they return, nobody they kept away may reach them.
    """
    await conn.execute("DELETE FROM contacts WHERE owner_id = ANY($1::uuid[])", user_ids)
    await conn.execute(
        """
        UPDATE profiles SET state = 'dormant', display_name = NULL, avatar_media_id = NULL, locale = 'en',
            time_zone = 'UTC', updated_at = $2
        WHERE user_id = ANY($1::uuid[])
        """,
        user_ids,
        now,
    )
