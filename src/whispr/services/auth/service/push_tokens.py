"""Push tokens: at rest only as AES-256-GCM under data keys, which rotate and lie sealed under the root keys."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.kit.identity import Caller
from whispr.kit.telemetry import get_logger
from whispr.services.auth import store
from whispr.services.auth.models import (
    DeliveryReport,
    DeviceNotFound,
    NewPushToken,
    PushChannel,
    PushToken,
    SealedKey,
    SealedPushToken,
    TokenPlace,
)
from whispr.services.auth.service.announcements import Announcer
from whispr.services.auth.service.audit import AuditTrail
from whispr.services.auth.service.vault import NONCE_BYTES, Unreadable, Vault
from whispr.services.auth.settings import AuthSettings

log = get_logger(__name__)

# A transaction that read the old key as the newest one has long ended when the old key may be dropped.
SETTLED = timedelta(hours=1)

_METHOD = "ReportDeviceDelivery"


class PushTokens:
    """Keeps, hands out and re-encrypts push tokens."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        vault: Vault,
        announcer: Announcer,
        audit: AuditTrail,
        settings: AuthSettings,
    ) -> None:
        self._db = db
        self._clock = clock
        self._vault = vault
        self._announcer = announcer
        self._audit = audit
        self._settings = settings
        self._ciphers: dict[str, AESGCM] = {}

    async def put(self, caller: Caller, device_id: UUID, token: NewPushToken) -> None:
        """Set the push token of one of the caller's active devices. Raises `DeviceNotFound`."""
        plain = token.token.encode()
        digest = hashlib.sha256(plain).digest()
        async with self._db.transaction() as tx:
            if await store.devices.lock_active(tx, caller.user_id, device_id) is None:
                raise DeviceNotFound
            await store.push_tokens.lock_token(tx, digest)
            key = await self._current_key(tx)
            nonce = secrets.token_bytes(NONCE_BYTES)
            sealed = self._cipher(key).encrypt(nonce, plain, _bound_to(device_id, token.channel, key.id))
            now = self._clock.now()
            await store.push_tokens.put(tx, device_id, token, key.id, nonce, sealed, digest, now)
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
            keys = {key.id: key for key in await store.push_tokens.data_keys(connection)} if sealed else {}
        tokens = []
        for row in sealed:
            try:
                plain = self._open(row, keys)
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

    async def rotate(self, *, force: bool) -> tuple[bool, str]:
        """Make a new data key if the newest is `data_key_days` old, or now if `force`; whether, and the newest's id."""
        async with self._db.transaction() as tx:
            await store.keys.lock_keys(tx)
            newest = next(iter(await store.push_tokens.data_keys(tx)), None)
            age = timedelta(days=self._settings.data_key_days)
            if newest is not None and not force and self._clock.now() < newest.created_at + age:
                return False, newest.id
            made = await self._make_key(tx, newest)
        return True, made.id

    async def tend(self) -> dict[str, int]:
        """Rotate when due, re-encrypt everything under old keys, drop keys without rows; rows per key left."""
        await self.rotate(force=False)
        await self._reseal_data_keys()
        place: TokenPlace | None = None
        while (place := await self.reencrypt_batch(place)) is not None:
            pass
        dropped: list[str] = []
        async with self._db.transaction() as tx:
            await store.keys.lock_keys(tx)
            newest = await self._current_key(tx)
            if self._clock.now() - newest.created_at >= SETTLED:
                dropped = await store.push_tokens.drop_unused_data_keys(tx, newest.id)
            for key_id in dropped:
                await self._audit.record(tx, "data_key_dropped", key_id=key_id)
        for key_id in dropped:
            self._ciphers.pop(key_id, None)
        async with self._db.connection() as connection:
            return await store.push_tokens.rows_per_key(connection)

    async def reencrypt_batch(self, after: TokenPlace | None = None) -> TokenPlace | None:
        """Bring up to `reencrypt_batch` tokens beyond `after` under the newest data key; the last place, None at the end.

        A token that does not open stays where it is: its key stays too, and whoever mends the ring can still read it.
        """
        async with self._db.transaction() as tx:
            keys = {key.id: key for key in await store.push_tokens.data_keys(tx)}
            newest = await self._current_key(tx)
            rows = await store.push_tokens.lock_under_old_keys(
                tx, newest.id, after, self._settings.reencrypt_batch
            )
            for row in rows:
                try:
                    plain = self._open(row, keys)
                except Unreadable:
                    log.exception("push_token_unreadable", device_id=str(row.device_id))
                    continue
                nonce = secrets.token_bytes(NONCE_BYTES)
                bound = _bound_to(row.device_id, row.channel, newest.id)
                sealed = self._cipher(newest).encrypt(nonce, plain, bound)
                await store.push_tokens.reseal(tx, row, newest.id, nonce, sealed)
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

    async def _reseal_data_keys(self) -> None:
        async with self._db.transaction() as tx:
            await store.keys.lock_keys(tx)
            for key in await store.push_tokens.data_keys(tx):
                if key.root_key_id != self._vault.primary:
                    secret = self._vault.open(key.root_key_id, key.sealed, _purpose(key.id))
                    sealed = self._vault.seal(secret, _purpose(key.id))
                    await store.push_tokens.reseal_data_key(tx, key.id, self._vault.primary, sealed)

    async def _current_key(self, tx: Connection) -> SealedKey:
        newest = next(iter(await store.push_tokens.data_keys(tx)), None)
        if newest is not None:
            return newest
        await store.keys.lock_keys(tx)
        keys = await store.push_tokens.data_keys(tx)
        return keys[0] if keys else await self._make_key(tx)

    async def _make_key(self, tx: Connection, newest: SealedKey | None = None) -> SealedKey:
        now = self._clock.now()
        if newest is not None:
            # A clock behind that of the process that made the newest must not make an older one.
            now = max(now, newest.created_at + timedelta(microseconds=1))
        key_id = f"data-{now:%Y%m%d}-{secrets.token_hex(4)}"
        sealed = self._vault.seal(secrets.token_bytes(32), _purpose(key_id))
        key = SealedKey(key_id, self._vault.primary, sealed, now)
        await store.push_tokens.insert_data_key(tx, key)
        await self._audit.record(tx, "data_key_made", key_id=key_id)
        return key

    def _cipher(self, key: SealedKey) -> AESGCM:
        if key.id not in self._ciphers:
            self._ciphers[key.id] = AESGCM(self._vault.open(key.root_key_id, key.sealed, _purpose(key.id)))
        return self._ciphers[key.id]

    def _open(self, row: SealedPushToken, keys: dict[str, SealedKey]) -> bytes:
        key = keys.get(row.data_key_id)
        if key is None:
            raise Unreadable(f"data key {row.data_key_id} is gone")
        try:
            return self._cipher(key).decrypt(
                row.nonce, row.ciphertext, _bound_to(row.device_id, row.channel, row.data_key_id)
            )
        except InvalidTag:
            raise Unreadable(f"the row does not open under data key {row.data_key_id}") from None


def _bound_to(device_id: UUID, channel: PushChannel, key_id: str) -> bytes:
    # A row copied to another device or channel does not open there.
    return f"{device_id}|{channel}|{key_id}".encode()


def _purpose(key_id: str) -> str:
    return f"data_key|{key_id}"
