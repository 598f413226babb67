"""Statements that read what a person is given of their own. None of them touches a secret."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.auth.models import (
    ExportedAccount,
    ExportedDevice,
    ExportedEvent,
    ExportedLink,
    ExportedPushToken,
    ExportedSession,
)


async def account(connection: Connection, account_id: UUID) -> ExportedAccount | None:
    row = await connection.fetchrow(
        """
        SELECT a.id AS user_id, a.username, a.status,
            array(SELECT r.role FROM account_roles r WHERE r.account_id = a.id ORDER BY r.role) AS roles,
            a.created_at, a.password_changed_at,
            EXISTS (
                SELECT FROM second_factors f WHERE f.account_id = a.id AND f.confirmed_at IS NOT NULL
            ) AS second_factor,
            (SELECT count(*) FROM recovery_codes c WHERE c.account_id = a.id) AS recovery_codes_left
        FROM accounts a WHERE a.id = $1
        """,
        account_id,
    )
    return None if row is None else ExportedAccount(**row)


async def devices(connection: Connection, account_id: UUID) -> list[ExportedDevice]:
    """Every device the account ever had, oldest first, without its push tokens."""
    rows = await connection.fetch(
        """
        SELECT d.id AS device_id, d.name, d.platform, d.registration_id, d.identity_key, d.signing_key, d.status,
            d.created_at, d.revoked_at AS removed_at, d.expired_at, d.last_seen_day AS last_seen_on,
            (SELECT l.key_id FROM lasting_prekeys l WHERE l.device_id = d.id AND l.kind = 'signed')
                AS signed_prekey_id,
            (SELECT l.key_id FROM lasting_prekeys l WHERE l.device_id = d.id AND l.kind = 'pq_last_resort')
                AS pq_last_resort_prekey_id,
            array(SELECT o.key_id FROM one_time_prekeys o WHERE o.device_id = d.id AND o.kind = 'ec' ORDER BY o.position)
                AS one_time_prekey_ids,
            array(SELECT o.key_id FROM one_time_prekeys o WHERE o.device_id = d.id AND o.kind = 'pq' ORDER BY o.position)
                AS pq_one_time_prekey_ids
        FROM devices d WHERE d.account_id = $1
        ORDER BY d.id
        """,
        account_id,
    )
    return [ExportedDevice(**row) for row in rows]


async def push_tokens(connection: Connection, account_id: UUID) -> dict[UUID, list[ExportedPushToken]]:
    """Where each device gets pushes, without the tokens themselves."""
    rows = await connection.fetch(
        """
        SELECT p.device_id, p.channel, p.app_id, p.environment, p.status, p.updated_at
        FROM push_tokens p JOIN devices d ON d.id = p.device_id
        WHERE d.account_id = $1
        ORDER BY p.device_id, p.channel, p.app_id
        """,
        account_id,
    )
    found: dict[UUID, list[ExportedPushToken]] = {}
    for device_id, *values in rows:
        found.setdefault(device_id, []).append(ExportedPushToken(*values))
    return found


async def sessions(connection: Connection, account_id: UUID) -> list[ExportedSession]:
    rows = await connection.fetch(
        """
        SELECT id AS session_id, device_id, created_at, last_used_at, expires_at, revoked_at AS ended_at,
            revoke_reason AS end_reason
        FROM sessions WHERE account_id = $1
        ORDER BY id
        """,
        account_id,
    )
    return [ExportedSession(**row) for row in rows]


async def links(connection: Connection, account_id: UUID, now: datetime) -> list[ExportedLink]:
    rows = await connection.fetch(
        """
        SELECT id AS link_id, by_device_id,
            CASE WHEN status IN ('waiting', 'claimed', 'confirmed') AND expires_at <= $2 THEN 'expired' ELSE status END
                AS status,
            created_at, device_id
        FROM device_links WHERE account_id = $1
        ORDER BY id
        """,
        account_id,
        now,
    )
    return [ExportedLink(**row) for row in rows]


async def events(connection: Connection, account_id: UUID, limit: int) -> list[ExportedEvent]:
    """The newest `limit` events of the audit trail, oldest first."""
    rows = await connection.fetch(
        """
        SELECT at, event, device_id, details FROM (
            SELECT * FROM audit_events WHERE account_id = $1 ORDER BY number DESC LIMIT $2
        ) AS newest
        ORDER BY number
        """,
        account_id,
        limit,
    )
    return [ExportedEvent(**row) for row in rows]
