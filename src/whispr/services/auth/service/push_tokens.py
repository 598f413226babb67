"""Push tokens: at rest only encrypted under data keys, in clear only for notification."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.kit.identity import Caller
from whispr.kit.telemetry import get_logger
from whispr.services.auth import store
from whispr.services.auth.models import (
    DeliveryReport,
    DeviceNotFound,
    Encrypted,
    NewPushToken,
    PushChannel,
    PushToken,
    SealedPushToken,
    TokenPlace,
)
from whispr.services.auth.service.announcements import Announcer
from whispr.services.auth.service.audit import AuditTrail
from whispr.services.auth.service.data_keys import DataKeyRing, DataKeys
from whispr.services.auth.service.vault import Unreadable
from whispr.services.auth.settings import AuthSettings

log = get_logger(__name__)

_METHOD = "ReportDeviceDelivery"


class PushTokens:
    """Keeps, hands out and re-encrypts push tokens."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        data_keys: DataKeys,
        announcer: Announcer,
        audit: AuditTrail,
        settings: AuthSettings,
    ) -> None:
        self._db = db
        self._clock = clock
        self._data_keys = data_keys
        self._announcer = announcer
        self._audit = audit
        self._settings = settings

    async def put(self, caller: Caller, device_id: UUID, token: NewPushToken) -> None:
        """Set the push token of one of the caller's active devices. Raises `DeviceNotFound`."""
        plain = token.token.encode()
        digest = hashlib.sha256(plain).digest()
        async with self._db.transaction() as tx:
            if await store.devices.lock_active(tx, caller.user_id, device_id) is None:
                raise DeviceNotFound
            await store.push_tokens.lock_token(tx, digest)
            key = await self._data_keys.current(tx)
            encrypted = self._data_keys.encrypt(key, plain, _purpose(device_id, token.channel))
            await store.push_tokens.put(tx, device_id, token, encrypted, digest, self._clock.now())
            await self._audit.record(tx, "push_token_set", caller.user_id, device_id, channel=token.channel)
        await self._announcer.tokens_changed(caller.user_id)

    async def remove(self, caller: Caller, device_id: UUID) -> None:
        """Remove every push token of one of the caller's devices. Raises `DeviceNotFound`."""
        async with self._db.transaction() as tx:
            if await store.devices.lock_active(tx, caller.user_id, device_id) is None:
                raise DeviceNotFound
            removed = await store.push_tokens.remove(tx, device_id)
            if removed:
                await self._audit.record(tx, "push_token_removed", caller.user_id, device_id)
        if removed:
            await self._announcer.tokens_changed(caller.user_id)

    async def of(self, user_ids: Sequence[UUID], device_ids: Sequence[UUID]) -> list[PushToken]:
        """Working push tokens in clear, by account or device. One that does not open is left out and logged."""
        async with self._db.connection() as connection:
            sealed = await store.push_tokens.active(connection, user_ids, device_ids)
            ring = await self._data_keys.ring(connection) if sealed else {}
        tokens = []
        for row in sealed:
            try:
                plain = self._open(row, ring)
            except Unreadable:
                log.exception("push_token_unreadable", device_id=str(row.device_id))
                continue
            tokens.append(
                PushToken(
                    user_id=row.account_id,
                    device_id=row.device_id,
                    platform=row.platform,
                    channel=row.channel,
                    token=plain.decode(),
                    app_id=row.app_id,
                    environment=row.environment,
                    updated_at=row.updated_at,
                    epoch=row.epoch,
                )
            )
        return tokens

    async def report(self, operation_id: UUID, reports: Sequence[DeliveryReport]) -> int:
        """Take note of what push services said; how many tokens changed. A report never touches a newer token."""
        async with self._db.transaction() as tx:
            known = await store.housekeeping.answer_of(tx, operation_id, _METHOD)
            if known is not None:
                return int(known["applied"])
            applied = 0
            for report in sorted(reports, key=lambda report: report.device_id):
                applied += await self._apply(tx, report)
            now = self._clock.now()
            await store.housekeeping.remember_answer(tx, operation_id, _METHOD, {"applied": applied}, now)
        return applied

    async def reencrypt(self) -> None:
        """Bring every token under the newest data key."""
        place: TokenPlace | None = None
        while (place := await self.reencrypt_batch(place)) is not None:
            pass

    async def per_key(self) -> dict[str, int]:
        """How many tokens lie under each data key."""
        async with self._db.connection() as connection:
            return await store.push_tokens.rows_per_key(connection)

    async def reencrypt_batch(self, after: TokenPlace | None = None) -> TokenPlace | None:
        """Bring up to `reencrypt_batch` tokens beyond `after` under the newest data key; the last place, None at the end.

        A token that does not open stays where it is: its key stays too, and whoever mends the ring can still read it.
        """
        async with self._db.transaction() as tx:
            ring = await self._data_keys.ring(tx)
            newest = await self._data_keys.current(tx)
            rows = await store.push_tokens.lock_under_old_keys(
                tx, newest.id, after, self._settings.reencrypt_batch
            )
            for row in rows:
                try:
                    plain = self._open(row, ring)
                except Unreadable:
                    log.exception("push_token_unreadable", device_id=str(row.device_id))
                    continue
                purpose = _purpose(row.device_id, row.channel)
                await store.push_tokens.reseal(tx, row, self._data_keys.encrypt(newest, plain, purpose))
        return (rows[-1].device_id, rows[-1].channel, rows[-1].app_id) if rows else None

    async def _apply(self, tx: Connection, report: DeliveryReport) -> int:
        if report.outcome == "invalid_token":
            return await store.push_tokens.drop_dead(
                tx, report.device_id, report.channel, report.token_updated_at
            )
        status = "inactive" if report.outcome == "inactive" else "active"
        return await store.push_tokens.set_status(
            tx, report.device_id, report.channel, report.token_updated_at, status
        )

    def _open(self, row: SealedPushToken, ring: DataKeyRing) -> bytes:
        encrypted = Encrypted(row.data_key_id, row.nonce, row.ciphertext)
        return self._data_keys.decrypt(ring, encrypted, _purpose(row.device_id, row.channel))


def _purpose(device_id: UUID, channel: PushChannel) -> str:
    return f"{device_id}|{channel}"
