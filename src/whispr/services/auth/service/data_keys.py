"""Data keys: what secrets at rest are encrypted under (AES-256-GCM). They rotate, and lie sealed under the root keys."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import timedelta

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.services.auth import store
from whispr.services.auth.models import Encrypted, SealedKey
from whispr.services.auth.service.audit import AuditTrail
from whispr.services.auth.service.vault import NONCE_BYTES, Unreadable, Vault
from whispr.services.auth.settings import AuthSettings

# A transaction that read the old key as the newest one has long ended when the old key may be dropped.
SETTLED = timedelta(hours=1)

DataKeyRing = Mapping[str, SealedKey]


class DataKeys:
    """Makes, uses, rotates and drops data keys."""

    def __init__(
        self, db: Database, clock: Clock, vault: Vault, audit: AuditTrail, settings: AuthSettings
    ) -> None:
        self._db = db
        self._clock = clock
        self._vault = vault
        self._audit = audit
        self._settings = settings
        self._ciphers: dict[str, AESGCM] = {}

    async def ring(self, connection: Connection) -> DataKeyRing:
        """Every data key by id, for `decrypt`."""
        return {key.id: key for key in await store.data_keys.newest_first(connection)}

    async def current(self, tx: Connection) -> SealedKey:
        """The key that encrypts; made if there is none yet."""
        newest = next(iter(await store.data_keys.newest_first(tx)), None)
        if newest is not None:
            return newest
        await store.keys.lock_keys(tx)
        keys = await store.data_keys.newest_first(tx)
        return keys[0] if keys else await self._make(tx)

    def encrypt(self, key: SealedKey, plain: bytes, purpose: str) -> Encrypted:
        """`plain` under `key`, bound to `purpose`: copied to another row it does not open there."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return Encrypted(key.id, nonce, self._cipher(key).encrypt(nonce, plain, _bound(purpose, key.id)))

    def decrypt(self, ring: DataKeyRing, encrypted: Encrypted, purpose: str) -> bytes:
        """What was encrypted. Raises `Unreadable`."""
        key = ring.get(encrypted.data_key_id)
        if key is None:
            raise Unreadable(f"data key {encrypted.data_key_id} is gone")
        try:
            return self._cipher(key).decrypt(encrypted.nonce, encrypted.ciphertext, _bound(purpose, key.id))
        except InvalidTag:
            raise Unreadable(f"the row does not open under data key {key.id}") from None

    async def rotate(self, *, force: bool) -> tuple[bool, str]:
        """Make a new key if the newest is `data_key_days` old, or now if `force`; whether, and the newest's id."""
        async with self._db.transaction() as tx:
            await store.keys.lock_keys(tx)
            newest = next(iter(await store.data_keys.newest_first(tx)), None)
            age = timedelta(days=self._settings.data_key_days)
            if newest is not None and not force and self._clock.now() < newest.created_at + age:
                return False, newest.id
            made = await self._make(tx, newest)
        return True, made.id

    async def reseal(self) -> None:
        """Bring every key under the primary root key."""
        async with self._db.transaction() as tx:
            await store.keys.lock_keys(tx)
            for key in await store.data_keys.newest_first(tx):
                if key.root_key_id != self._vault.primary:
                    secret = self._vault.open(key.root_key_id, key.sealed, _purpose(key.id))
                    sealed = self._vault.seal(secret, _purpose(key.id))
                    await store.data_keys.reseal(tx, key.id, self._vault.primary, sealed)

    async def drop_unused(self) -> None:
        """Drop keys that nothing lies under any more, once the newest is settled."""
        dropped: list[str] = []
        async with self._db.transaction() as tx:
            await store.keys.lock_keys(tx)
            newest = await self.current(tx)
            if self._clock.now() - newest.created_at >= SETTLED:
                dropped = await store.data_keys.drop_unused(tx, newest.id)
            for key_id in dropped:
                await self._audit.record(tx, "data_key_dropped", key_id=key_id)
        for key_id in dropped:
            self._ciphers.pop(key_id, None)

    async def _make(self, tx: Connection, newest: SealedKey | None = None) -> SealedKey:
        now = self._clock.now()
        if newest is not None:
            # A clock behind that of the process that made the newest must not make an older one.
            now = max(now, newest.created_at + timedelta(microseconds=1))
        key_id = f"data-{now:%Y%m%d}-{secrets.token_hex(4)}"
        sealed = self._vault.seal(secrets.token_bytes(32), _purpose(key_id))
        key = SealedKey(key_id, self._vault.primary, sealed, now)
        await store.data_keys.insert(tx, key)
        await self._audit.record(tx, "data_key_made", key_id=key_id)
        return key

    def _cipher(self, key: SealedKey) -> AESGCM:
        if key.id not in self._ciphers:
            self._ciphers[key.id] = AESGCM(self._vault.open(key.root_key_id, key.sealed, _purpose(key.id)))
        return self._ciphers[key.id]


def _bound(purpose: str, key_id: str) -> bytes:
    return f"{purpose}|{key_id}".encode()


def _purpose(key_id: str) -> str:
    return f"data_key|{key_id}"
