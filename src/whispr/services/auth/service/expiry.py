"""Devices that were away for too long leave the account: nobody encrypts for a phone that lies in a drawer for ever."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.identity import Revocation
from whispr.services.auth import store
from whispr.services.auth.models import DEVICE_EXPIRED, Device, Subject
from whispr.services.auth.service.announcements import Announcer
from whispr.services.auth.service.audit import AuditTrail
from whispr.services.auth.settings import AuthSettings

# For as long its refresh and login say why it is out, so that the client offers to link it anew.
REMEMBERED = timedelta(days=365)

_BATCH = 200


class Expiry:
    """Safe to run in every process at once. A device was last seen on the day of its last login or refresh."""

    def __init__(
        self, db: Database, clock: Clock, announcer: Announcer, audit: AuditTrail, settings: AuthSettings
    ) -> None:
        self._db = db
        self._clock = clock
        self._announcer = announcer
        self._audit = audit
        self._days = settings.device_expiry_days

    async def run(self) -> int:
        """Remove every device that was not seen for more than `device_expiry_days`; how many."""
        if not self._days:
            return 0
        now, count = self._clock.now(), 0
        after: UUID | None = None
        before = (now - timedelta(days=self._days)).date()
        while True:
            async with self._db.connection() as connection:
                account_ids = await store.devices.accounts_with_absent(connection, before, after, _BATCH)
            if not account_ids:
                return count
            for account_id in account_ids:
                count += await self._expire(account_id, now)
            after = account_ids[-1]

    async def _expire(self, account_id: UUID, now: datetime) -> int:
        before = (now - timedelta(days=self._days)).date()
        async with self._db.transaction() as tx:
            await store.accounts.lock(tx, account_id)
            candidates = await store.devices.absent(tx, account_id, before)
            sessions = await store.sessions.lock_of_devices(tx, candidates)
            # Looked at again under the sessions' locks: a refresh may just have seen the device.
            device_ids = await store.devices.lock_absent(tx, candidates, before)
            if not device_ids:
                return 0
            ended = [session_id for session_id, device_id in sessions if device_id in device_ids]
            await store.sessions.revoke(tx, ended, DEVICE_EXPIRED, now)
            await store.devices.revoke(tx, device_ids, now, are_expired=True)
            await store.sessions.add_revocations(tx, Subject.DEVICE, device_ids, now)
            epoch = await store.accounts.bump_epoch(tx, account_id)
            for device_id in device_ids:
                await self._audit.record(tx, DEVICE_EXPIRED, account_id, device_id)
        revocations = [Revocation(subject="device", id=device_id, at=now) for device_id in device_ids]
        await self._announcer.revoked(revocations)
        await self._announcer.devices_changed(account_id, epoch)
        return len(device_ids)


def is_remembered(device: Device, now: datetime) -> bool:
    """Is this a device that expired within the last year?"""
    return device.expired_at is not None and now < device.expired_at + REMEMBERED
