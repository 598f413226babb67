"""Roles: who may do more than an ordinary person."""

from __future__ import annotations

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.services.auth import store
from whispr.services.auth.models import ROLES, InvalidRole, UserNotFound
from whispr.services.auth.service.audit import AuditTrail


class Roles:
    """Given and taken by whoever runs the instance. A change is in force at the person's next login or refresh."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self._audit = AuditTrail(clock)

    async def grant(self, username: str, role: str) -> bool:
        """Give a role; False if the account has it already. Raises `UserNotFound`, `InvalidRole`."""
        return await self._change(username, role, granted=True)

    async def revoke(self, username: str, role: str) -> bool:
        """Take a role away; False if the account has it not. Raises `UserNotFound`, `InvalidRole`."""
        return await self._change(username, role, granted=False)

    async def _change(self, username: str, role: str, *, granted: bool) -> bool:
        if role not in ROLES:
            raise InvalidRole(f"There is no role {role!r}; there are {' and '.join(ROLES)}.")
        async with self._db.transaction() as tx:
            account = await store.accounts.by_username(tx, username)
            if account is None:
                raise UserNotFound
            if granted:
                changed = await store.accounts.grant_role(tx, account.id, role, self._clock.now())
            else:
                changed = await store.accounts.revoke_role(tx, account.id, role)
            if changed:
                event = "role_granted" if granted else "role_revoked"
                await self._audit.record(tx, event, account.id, role=role)
        return changed
