"""Accounts: password, deletion, and what others may know of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from uuid import UUID

from whispr.kit import outbox
from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.kit.identity import Caller, Revocation
from whispr.kit.ids import uuid7
from whispr.services.auth import store
from whispr.services.auth.models import (
    ERASING_SERVICES,
    NO_CODES,
    USERNAME,
    Account,
    AccountInfo,
    Codes,
    Proof,
    Subject,
    erase_topic,
)
from whispr.services.auth.service.announcements import Announcer
from whispr.services.auth.service.audit import AuditTrail
from whispr.services.auth.service.credentials import Credentials
from whispr.services.auth.service.entry import username_digest
from whispr.services.auth.service.second_factor import SecondFactor
from whispr.services.auth.service.sessions import Sessions


class Accounts:
    """What one does with an account one has."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        credentials: Credentials,
        second_factor: SecondFactor,
        sessions: Sessions,
        announcer: Announcer,
        audit: AuditTrail,
        wake_outbox: Callable[[], None],
    ) -> None:
        self._db = db
        self._clock = clock
        self._credentials = credentials
        self._second_factor = second_factor
        self._sessions = sessions
        self._announcer = announcer
        self._audit = audit
        self._wake_outbox = wake_outbox

    async def change_password(
        self, caller: Caller, current_password: str, new_password: str, codes: Codes = NO_CODES
    ) -> None:
        """Change the caller's password and end all other sessions.

        Raises `WrongPassword`, `TotpRequired`, `BadTotpCode`, `RateLimited`, `Busy`.
        """
        account = await self._credentials.prove_owner(caller, current_password)
        password_hash = await self._credentials.hash(new_password)
        revocations: list[Revocation] = []
        async with self._db.transaction() as tx:
            await self._credentials.lock_proven(tx, account)
            proof = await self._second_factor.check(tx, account.id, codes)
            if proof.refused is None:
                await store.accounts.set_password(tx, account.id, password_hash, self._clock.now())
                living = await store.sessions.live_of_account(tx, account.id)
                others = [session_id for session_id in living if session_id != caller.session_id]
                revocations = await self._sessions.revoke(tx, others, "password_changed")
                await self._audit.record(
                    tx,
                    "password_changed",
                    account.id,
                    caller.device_id,
                    sessions_ended=len(others),
                    **proof.details,
                )
        if proof.refused is not None:
            raise proof.refused
        await self._announcer.revoked(revocations)

    async def delete(self, caller: Caller, password: str, codes: Codes = NO_CODES) -> None:
        """Delete the caller's account: here at once, everywhere else through the outbox. The username stays taken.

        Raises `WrongPassword`, `TotpRequired`, `BadTotpCode`, `RateLimited`, `Busy`.
        """
        account = await self._credentials.prove_owner(caller, password)
        now = self._clock.now()
        async with self._db.transaction() as tx:
            await self._credentials.lock_proven(tx, account)
            proof = await self._second_factor.check(tx, account.id, codes)
            if proof.refused is None:
                await self._erase(tx, account, caller, proof, now)
        if proof.refused is not None:
            raise proof.refused
        self._wake_outbox()
        await self._announcer.revoked([Revocation(subject="user", id=account.id, at=now)])
        await self._announcer.tokens_changed(account.id)

    async def _erase(
        self, tx: Connection, account: Account, caller: Caller, proof: Proof, now: datetime
    ) -> None:
        assert account.username is not None
        # Before the devices, because a refresh locks its session first and its device second.
        living = await store.sessions.live_of_account(tx, account.id)
        await store.sessions.revoke(tx, living, "account_deleted", now)
        await store.accounts.erase(tx, account.id, username_digest(account.username), now)
        await store.sessions.add_revocations(tx, Subject.USER, [account.id], now)
        for service in ERASING_SERVICES:
            operation_id = str(uuid7())
            payload = {"user_id": str(account.id), "operation_id": operation_id}
            await outbox.add(tx, erase_topic(service), operation_id, payload)
        await self._audit.record(tx, "account_deleted", account.id, caller.device_id, **proof.details)

    async def info(self, user_ids: Sequence[UUID], username: str | None) -> list[AccountInfo]:
        """Accounts by id, or the living one with this exact name; unknown ones are left out."""
        # PostgreSQL refuses to compare what no username can be, such as NUL.
        name = username if username is not None and re.match(USERNAME, username) else None
        async with self._db.connection() as connection:
            return await store.accounts.info(connection, user_ids, name)
