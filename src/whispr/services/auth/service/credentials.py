"""Proof by password, with one answer for everything that can be wrong."""

from __future__ import annotations

from dataclasses import replace

from whispr.kit.db import Connection, Database
from whispr.kit.identity import Caller
from whispr.services.auth import store
from whispr.services.auth.models import Account, InvalidCredentials, Origin, WrongPassword
from whispr.services.auth.service.audit import AuditTrail
from whispr.services.auth.service.limits import Limits
from whispr.services.auth.service.passwords import Passwords


class Credentials:
    """Proves who someone is. Hashing takes long, so it happens outside transactions; `lock_unchanged` closes the gap."""

    def __init__(self, db: Database, passwords: Passwords, audit: AuditTrail, limits: Limits) -> None:
        self._db = db
        self._passwords = passwords
        self._audit = audit
        self._limits = limits

    async def prove(self, username: str, password: str, origin: Origin) -> Account:
        """The account of `username`. Raises `InvalidCredentials`, after the same work whether the name exists or not."""
        await self._limits.log_in(origin, username)
        account = await self.find(username)
        active = account is not None and account.status == "active"
        known = account.password_hash if account is not None and active else None
        if not await self._passwords.verify(known, password) or account is None or known is None:
            # An event for nobody is worth little, but writing none would answer faster for names that do not exist.
            async with self._db.transaction() as tx:
                await self._audit.record(tx, "login_failed", account.id if account is not None else None)
            raise InvalidCredentials
        if not self._passwords.outdated(known):
            return account
        renewed = await self._passwords.hash(password)
        async with self._db.connection() as connection:
            await store.accounts.renew_hash(connection, account.id, known, renewed)
        return replace(account, password_hash=renewed)

    async def prove_owner(self, caller: Caller, password: str) -> Account:
        """The caller's account. Raises `WrongPassword`."""
        await self._limits.password(caller.user_id)
        async with self._db.connection() as connection:
            account = await store.accounts.by_id(connection, caller.user_id)
        known = account.password_hash if account is not None else None
        if not await self._passwords.verify(known, password) or account is None:
            raise WrongPassword
        return account

    async def lock_unchanged(self, tx: Connection, account: Account) -> bool:
        """Lock the account; False if its password or status has changed since it was proven."""
        current = await store.accounts.lock(tx, account.id)
        return (
            current is not None
            and current.status == "active"
            and current.password_hash == account.password_hash
        )

    async def lock_proven(self, tx: Connection, account: Account) -> None:
        """Lock the caller's account. Raises `WrongPassword` if its password or status has changed since it was proven."""
        if not await self.lock_unchanged(tx, account):
            raise WrongPassword

    async def find(self, username: str) -> Account | None:
        async with self._db.connection() as connection:
            return await store.accounts.by_username(connection, username)

    async def matches(self, account: Account, password: str) -> bool:
        return await self._passwords.verify(account.password_hash, password)

    async def hash(self, password: str) -> str:
        return await self._passwords.hash(password)
