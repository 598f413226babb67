"""Statements on accounts, retired usernames and roles."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from whispr.kit.db import Connection
from whispr.services.auth.models import Account, AccountInfo

_COLUMNS = "id, username, password_hash, status, device_list_epoch, created_at"


def _account(row: asyncpg.Record | None) -> Account | None:
    return None if row is None else Account(*row)


async def insert(tx: Connection, account_id: UUID, username: str, password_hash: str, now: datetime) -> bool:
    """Add an account; False if the name is taken by a living one. Waits for a transaction that is adding the same."""
    row = await tx.fetchval(
        """
        INSERT INTO accounts (id, username, password_hash, created_at, password_changed_at)
        VALUES ($1, $2, $3, $4, $4)
        ON CONFLICT (username) DO NOTHING
        RETURNING id
        """,
        account_id,
        username,
        password_hash,
        now,
    )
    return row is not None


async def is_retired(tx: Connection, digest: bytes) -> bool:
    """Was this name an account's that is deleted? Ask after `insert`, so that a deletion just committed is seen."""
    return bool(await tx.fetchval("SELECT EXISTS (SELECT FROM retired_usernames WHERE digest = $1)", digest))


async def by_username(connection: Connection, username: str) -> Account | None:
    return _account(
        await connection.fetchrow(f"SELECT {_COLUMNS} FROM accounts WHERE username = $1", username)
    )


async def by_id(connection: Connection, account_id: UUID) -> Account | None:
    return _account(await connection.fetchrow(f"SELECT {_COLUMNS} FROM accounts WHERE id = $1", account_id))


async def lock(tx: Connection, account_id: UUID) -> Account | None:
    """The account, locked until the transaction ends: changes of its devices and password go one after the other."""
    return _account(
        await tx.fetchrow(f"SELECT {_COLUMNS} FROM accounts WHERE id = $1 FOR NO KEY UPDATE", account_id)
    )


async def set_password(tx: Connection, account_id: UUID, password_hash: str, now: datetime) -> None:
    await tx.execute(
        "UPDATE accounts SET password_hash = $2, password_changed_at = $3 WHERE id = $1",
        account_id,
        password_hash,
        now,
    )


async def renew_hash(connection: Connection, account_id: UUID, old_hash: str, new_hash: str) -> None:
    """The same password under new parameters; nothing happens if the password changed meanwhile."""
    await connection.execute(
        "UPDATE accounts SET password_hash = $3 WHERE id = $1 AND password_hash = $2",
        account_id,
        old_hash,
        new_hash,
    )


async def bump_epoch(tx: Connection, account_id: UUID) -> int:
    """Count a change of the device list; the new epoch."""
    epoch = await tx.fetchval(
        "UPDATE accounts SET device_list_epoch = device_list_epoch + 1 WHERE id = $1 RETURNING device_list_epoch",
        account_id,
    )
    return int(epoch)


async def erase(tx: Connection, account_id: UUID, username_digest: bytes, now: datetime) -> None:
    """Forget everything of an account but its id; its name stays taken as a digest. Sessions and keys go with devices."""
    await tx.execute("DELETE FROM devices WHERE account_id = $1", account_id)
    for table in ("account_roles", "second_factors", "device_links"):
        await tx.execute(f"DELETE FROM {table} WHERE account_id = $1", account_id)
    await tx.execute(
        "INSERT INTO retired_usernames (digest, retired_at) VALUES ($1, $2) ON CONFLICT DO NOTHING",
        username_digest,
        now,
    )
    await tx.execute(
        """
        UPDATE accounts
        SET username = NULL, password_hash = NULL, status = 'deleted', deleted_at = $2,
            device_list_epoch = device_list_epoch + 1
        WHERE id = $1
        """,
        account_id,
        now,
    )


async def roles(connection: Connection, account_id: UUID) -> list[str]:
    rows = await connection.fetch(
        "SELECT role FROM account_roles WHERE account_id = $1 ORDER BY role", account_id
    )
    return [row["role"] for row in rows]


async def grant_role(tx: Connection, account_id: UUID, role: str, now: datetime) -> bool:
    """True if the account did not have the role."""
    status = await tx.execute(
        "INSERT INTO account_roles (account_id, role, granted_at) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        account_id,
        role,
        now,
    )
    return status == "INSERT 0 1"


async def revoke_role(tx: Connection, account_id: UUID, role: str) -> bool:
    """True if the account had the role."""
    status = await tx.execute(
        "DELETE FROM account_roles WHERE account_id = $1 AND role = $2", account_id, role
    )
    return status == "DELETE 1"


async def info(
    connection: Connection, account_ids: Sequence[UUID], username: str | None
) -> list[AccountInfo]:
    """Accounts by id, or the living one with this exact name; unknown ones are left out."""
    rows = await connection.fetch(
        """
        SELECT a.id, a.username, a.status, a.created_at,
            array(SELECT r.role FROM account_roles r WHERE r.account_id = a.id ORDER BY r.role) AS roles
        FROM accounts a
        WHERE a.id = ANY($1::uuid[]) OR a.username = $2
        ORDER BY a.id
        """,
        list(account_ids),
        username,
    )
    return [
        AccountInfo(row["id"], row["username"], row["status"], row["created_at"], tuple(row["roles"]))
        for row in rows
    ]
