"""Quotas: what a person may store, and the bookkeeping of what they do store.

Bytes are set aside before an upload and become use when it is there, so that two uploads at once cannot both take the
last room. Every change names an operation and may be repeated.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import msgspec

from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.services.user import store
from whispr.services.user.models import (
    InvalidBytes,
    OperationConflict,
    QuotaExceeded,
    Quotas,
    Reservation,
    ReservationNotFound,
    ReservationSettled,
    StorageRequest,
    StorageUnderflow,
    StorageUsage,
    UserNotFound,
)
from whispr.services.user.service.directory import Directory
from whispr.services.user.settings import UserSettings

# The counters are bigint: no sum of them may leave that range.
MOST_BYTES = 2**50

EXPIRY_BATCH = 500


class Storage:
    """Reads quotas and keeps the storage counters."""

    def __init__(
        self, database: Database, directory: Directory, clock: Clock, settings: UserSettings
    ) -> None:
        self._database = database
        self._directory = directory
        self._clock = clock
        self._settings = settings

    async def quotas(self, user_id: UUID) -> Quotas:
        """All limits of a person with their use. Raises UserNotFound."""
        await self._directory.ensure([user_id])
        async with self._database.connection() as conn:
            if await store.profile(conn, user_id) is None:
                raise UserNotFound
            return Quotas(
                storage=await store.storage_usage(conn, user_id, self._settings.storage_limit_bytes),
                contacts_limit=self._settings.contacts_limit,
                contacts_used=await store.count_contacts(conn, user_id),
                blocks_limit=self._settings.blocks_limit,
                blocks_used=await store.count_blocks(conn, user_id),
            )

    async def update(self, request: StorageRequest) -> StorageUsage:
        """Carry out one change and answer the counters after it; a repeated request gets its first answer.

        Raises InvalidBytes, UserNotFound, QuotaExceeded, StorageUnderflow, ReservationNotFound, ReservationSettled,
        OperationConflict. A refused change leaves no trace and may be tried again under the same id.
        """
        _check(request)
        await self._directory.ensure([request.user_id])
        async with self._database.transaction() as tx:
            states = await store.lock_profiles(tx, [request.user_id])
            if request.user_id not in states:
                raise UserNotFound
            if not await store.begin_operation(tx, request.operation_id, _ledger(request), self._clock.now()):
                return await self._repeated(tx, request)
            if states[request.user_id] == "erased":
                usage = self._usage_of_the_erased(request)
            else:
                usage = await self._apply(tx, request)
            await store.finish_operation(tx, request.operation_id, msgspec.to_builtins(usage))
            return usage

    async def expire_reservations(self) -> int:
        """Give back what abandoned uploads still hold; how many there were."""
        total = 0
        while True:
            async with self._database.transaction() as tx:
                count = await store.expire_reservations(tx, self._clock.now(), EXPIRY_BATCH)
            total += count
            if count < EXPIRY_BATCH:
                return total

    async def forget_operations(self) -> int:
        """Delete what is kept for repeated requests past the time anyone repeats them; how many rows."""
        before = self._clock.now() - timedelta(days=self._settings.operation_retention_days)
        async with self._database.connection() as conn:
            operations = await store.delete_old_operations(conn, before)
            return operations + await store.delete_settled_reservations(conn, before)

    async def _repeated(self, tx: Connection, request: StorageRequest) -> StorageUsage:
        done = await store.operation(tx, request.operation_id)
        if done is None or done[0] != _ledger(request):
            raise OperationConflict
        return msgspec.convert(done[1], StorageUsage)

    def _usage_of_the_erased(self, request: StorageRequest) -> StorageUsage:
        """Their bytes are no longer counted: giving some back succeeds, taking some does not."""
        if request.action in ("reserve", "commit"):
            raise UserNotFound
        return StorageUsage(limit=self._settings.storage_limit_bytes, used=0, reserved=0)

    async def _apply(self, tx: Connection, request: StorageRequest) -> StorageUsage:
        now = self._clock.now()
        reservation_id = request.reservation_id or request.operation_id
        # Always the reservation first, then the counters: the expiry takes them in that order too.
        reservation = await store.lock_reservation(tx, reservation_id) if request.action != "free" else None
        if reservation is not None and reservation.user_id != request.user_id:
            raise ReservationNotFound
        usage = await store.lock_storage_usage(tx, request.user_id, self._settings.storage_limit_bytes)
        if request.action == "free":
            changed = _freed(usage, request.bytes)
        elif request.action == "reserve":
            changed = _reserved(usage, reservation, request.bytes)
            await self._add(tx, Reservation(reservation_id, request.user_id, request.bytes, "reserved"))
        elif request.action == "commit":
            if reservation is None:
                raise ReservationNotFound
            changed = _committed(usage, reservation, request.bytes)
            await store.settle_reservation(tx, reservation_id, "committed", now)
        else:
            changed = _released(usage, reservation)
            if reservation is None:
                # A release may overtake a reserve whose answer was lost; the late reserve must then not stick.
                await self._add(tx, Reservation(reservation_id, request.user_id, 0, "released"))
            else:
                await store.settle_reservation(tx, reservation_id, "released", now)
        await store.set_storage_usage(tx, request.user_id, changed)
        return changed

    async def _add(self, tx: Connection, reservation: Reservation) -> None:
        now = self._clock.now()
        expires_at = now + timedelta(seconds=self._settings.reservation_seconds)
        if not await store.add_reservation(tx, reservation, now, expires_at):
            raise ReservationSettled


def _check(request: StorageRequest) -> None:
    least = 1 if request.action in ("reserve", "free") else 0
    if not least <= request.bytes <= MOST_BYTES:
        raise InvalidBytes
    if request.action in ("commit", "release") and request.reservation_id is None:
        raise ReservationNotFound


def _ledger(request: StorageRequest) -> dict[str, Any]:
    return {
        "user_id": str(request.user_id),
        "action": request.action,
        "bytes": request.bytes,
        "reservation_id": str(request.reservation_id) if request.reservation_id else None,
    }


def _reserved(usage: StorageUsage, reservation: Reservation | None, count: int) -> StorageUsage:
    if reservation is not None:
        raise ReservationSettled
    return _within_limit(StorageUsage(usage.limit, usage.used, usage.reserved + count), count)


def _committed(usage: StorageUsage, reservation: Reservation, count: int) -> StorageUsage:
    """An expired reservation may still be committed while there is room: the bytes are there and must be counted."""
    if reservation.state not in ("reserved", "expired"):
        raise ReservationSettled
    held = reservation.bytes if reservation.state == "reserved" else 0
    actual = count or reservation.bytes
    changed = StorageUsage(usage.limit, usage.used + actual, usage.reserved - held)
    return _within_limit(changed, actual - held)


def _released(usage: StorageUsage, reservation: Reservation | None) -> StorageUsage:
    if reservation is None or reservation.state in ("released", "expired"):
        return usage
    if reservation.state == "committed":
        raise ReservationSettled
    return StorageUsage(usage.limit, usage.used, usage.reserved - reservation.bytes)


def _freed(usage: StorageUsage, count: int) -> StorageUsage:
    if count > usage.used:
        raise StorageUnderflow(used=usage.used)
    return StorageUsage(usage.limit, usage.used - count, usage.reserved)


def _within_limit(changed: StorageUsage, growth: int) -> StorageUsage:
    """Refuse to grow past the limit; shrinking is fine even above one that was lowered."""
    if growth > 0 and changed.used + changed.reserved > changed.limit:
        available = max(0, changed.limit - (changed.used + changed.reserved - growth))
        raise QuotaExceeded(limit=changed.limit, available=available)
    return changed
