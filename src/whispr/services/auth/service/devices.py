"""Devices: listing, removal, and what other services may know of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.identity import Caller, Revocation
from whispr.services.auth import store
from whispr.services.auth.models import Device, DeviceList, DeviceNotFound, Subject
from whispr.services.auth.service.announcements import Announcer
from whispr.services.auth.service.audit import AuditTrail


class Devices:
    """The device lists. Each change of one counts its epoch up in the same transaction."""

    def __init__(self, db: Database, clock: Clock, announcer: Announcer, audit: AuditTrail) -> None:
        self._db = db
        self._clock = clock
        self._announcer = announcer
        self._audit = audit

    async def page(self, caller: Caller, after: UUID | None, limit: int) -> list[Device]:
        """The caller's active devices, oldest first."""
        async with self._db.connection() as connection:
            return await store.devices.page(connection, caller.user_id, after, limit)

    async def remove(self, caller: Caller, device_id: UUID) -> None:
        """Remove one of the caller's devices with its sessions, prekeys and push tokens; again changes nothing.

        Raises `DeviceNotFound`.
        """
        now = self._clock.now()
        async with self._db.transaction() as tx:
            await store.accounts.lock(tx, caller.user_id)
            device = await store.devices.by_id(tx, device_id)
            if device is None or device.account_id != caller.user_id:
                raise DeviceNotFound
            if not device.active:
                return
            living = await store.sessions.live_of_device(tx, device_id, now)
            await store.sessions.revoke(tx, living, "device_removed", now)
            await store.devices.revoke(tx, [device_id], now)
            await store.sessions.add_revocations(tx, Subject.DEVICE, [device_id], now)
            epoch = await store.accounts.bump_epoch(tx, caller.user_id)
            await self._audit.record(
                tx, "device_removed", caller.user_id, device_id, by_device=str(caller.device_id)
            )
        await self._announcer.revoked([Revocation(subject="device", id=device_id, at=now)])
        await self._announcer.devices_changed(caller.user_id, epoch)

    async def lists(self, user_ids: Sequence[UUID]) -> list[DeviceList]:
        """Epoch and active devices of each account; unknown and deleted ones are left out."""
        async with self._db.connection() as connection:
            return await store.devices.lists(connection, user_ids)

    async def info(self, device_id: UUID) -> Device:
        """A device, removed ones included: their keys still verify what they signed. Raises `DeviceNotFound`."""
        async with self._db.connection() as connection:
            device = await store.devices.by_id(connection, device_id)
        if device is None:
            raise DeviceNotFound
        return device

    async def validate(self, user_id: UUID, device_id: UUID) -> Literal["", "unknown", "revoked", "foreign"]:
        """Why this is not an active device of this account; empty if it is."""
        async with self._db.connection() as connection:
            device = await store.devices.by_id(connection, device_id)
        if device is None:
            return "unknown"
        if device.account_id != user_id:
            return "foreign"
        return "" if device.active else "revoked"
