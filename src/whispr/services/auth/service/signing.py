"""Signing keys of access tokens: made, published before they sign, kept until nothing they signed is valid."""

from __future__ import annotations

import secrets
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.kit.ids import uuid7
from whispr.kit.telemetry import get_logger
from whispr.services.auth import store
from whispr.services.auth.models import SigningKeyRecord
from whispr.services.auth.service.audit import AuditTrail
from whispr.services.auth.service.vault import Vault
from whispr.services.auth.settings import DAY, AuthSettings

log = get_logger(__name__)

# How far the clocks of two processes may be apart.
SKEW = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class _Key:
    id: str
    private: Ed25519PrivateKey
    public: bytes
    active_from: datetime


class SigningKeys:
    """Signs access tokens with the key whose time it is. Every process holds all keys and switches by the clock."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        vault: Vault,
        audit: AuditTrail,
        settings: AuthSettings,
        issuer: str,
        audience: str,
    ) -> None:
        self._db = db
        self._clock = clock
        self._vault = vault
        self._audit = audit
        self._settings = settings
        self._issuer = issuer
        self._audience = audience
        self._keys: list[_Key] = []

    async def load(self) -> None:
        """Read the keys; make the first one if there is none. Raises `Unreadable` if the ring cannot open them."""
        async with self._db.connection() as connection:
            records = await store.keys.signing_keys(connection)
        if not records:
            records = await self._make_first()
        self._keys = [self._open(record) for record in records]

    async def jwks(self) -> dict[str, Any]:
        """The public keys as at `/.well-known/jwks.json`, those that will sign next and that signed last included."""
        if not self._keys:
            await self.load()
        return {"keys": [_jwk(key) for key in self._keys]}

    async def access_token(
        self, user_id: UUID, device_id: UUID, session_id: UUID, roles: Iterable[str]
    ) -> str:
        """A signed token that is good for `access_token_seconds`."""
        if not self._keys:
            await self.load()
        key = self._current(self._clock.now())
        issued_at = int(self._clock.time())
        return make_token(
            key.private,
            key.id,
            {
                "iss": self._issuer,
                "aud": self._audience,
                "sub": str(user_id),
                "did": str(device_id),
                "sid": str(session_id),
                "roles": sorted(roles),
                "iat": issued_at,
                "nbf": issued_at,
                "exp": issued_at + self._settings.access_token_seconds,
                "jti": str(uuid7()),
            },
        )

    async def rotate(self, *, force: bool) -> tuple[bool, str]:
        """Make the next key if it is due, or now if `force`; whether one was made, and the id of the newest.

        The new key signs only after `signing_key_notice_seconds`: every verifier has it by then.
        """
        now = self._clock.now()
        notice = timedelta(seconds=self._settings.signing_key_notice_seconds)
        async with self._db.transaction() as tx:
            await store.keys.lock_keys(tx)
            records = await store.keys.signing_keys(tx)
            newest = records[-1] if records else None
            if newest is not None:
                due_at = (
                    newest.active_from + timedelta(seconds=self._settings.signing_key_days * DAY) - notice
                )
                pending = newest.active_from > now
                if pending or not (force or now >= due_at):
                    return False, newest.id
            made = await self._make(tx, now, now + notice if records else now)
        await self.load()
        return True, made.id

    async def tend(self) -> None:
        """Rotate when due, drop keys nothing valid was signed with, re-seal after a change of root key, read again."""
        await self.rotate(force=False)
        now = self._clock.now()
        outlived = timedelta(seconds=self._settings.access_token_seconds) + SKEW
        async with self._db.transaction() as tx:
            await store.keys.lock_keys(tx)
            records = await store.keys.signing_keys(tx)
            dead = [record.id for record, next_ in pairwise(records) if now > next_.active_from + outlived]
            await store.keys.drop_signing_keys(tx, dead)
            for record in records:
                if record.root_key_id != self._vault.primary and record.id not in dead:
                    secret = self._vault.open(record.root_key_id, record.sealed, _purpose(record.id))
                    sealed = self._vault.seal(secret, _purpose(record.id))
                    await store.keys.reseal_signing_key(tx, record.id, self._vault.primary, sealed)
        await self.load()

    def _current(self, now: datetime) -> _Key:
        active = [key for key in self._keys if key.active_from <= now]
        # The clock of the process that made the only key may be ahead of ours.
        return active[-1] if active else self._keys[0]

    async def _make_first(self) -> list[SigningKeyRecord]:
        async with self._db.transaction() as tx:
            await store.keys.lock_keys(tx)
            if not await store.keys.signing_keys(tx):
                now = self._clock.now()
                await self._make(tx, now, now)
            return await store.keys.signing_keys(tx)

    async def _make(self, tx: Connection, now: datetime, active_from: datetime) -> SigningKeyRecord:
        key_id = f"sig-{now:%Y%m%d}-{secrets.token_hex(4)}"
        private = Ed25519PrivateKey.generate()
        record = SigningKeyRecord(
            id=key_id,
            public_key=private.public_key().public_bytes_raw(),
            root_key_id=self._vault.primary,
            sealed=self._vault.seal(private.private_bytes_raw(), _purpose(key_id)),
            created_at=now,
            active_from=active_from,
        )
        await store.keys.insert_signing_key(tx, record)
        await self._audit.record(tx, "signing_key_made", key_id=key_id)
        log.info("signing_key_made", kid=key_id, active_from=active_from.isoformat())
        return record

    def _open(self, record: SigningKeyRecord) -> _Key:
        secret = self._vault.open(record.root_key_id, record.sealed, _purpose(record.id))
        return _Key(
            record.id, Ed25519PrivateKey.from_private_bytes(secret), record.public_key, record.active_from
        )


def make_token(private: Ed25519PrivateKey, key_id: str, claims: dict[str, Any]) -> str:
    """A JWT of `claims`, signed with EdDSA and naming its key."""
    return jwt.encode(claims, private, algorithm="EdDSA", headers={"kid": key_id})


def _purpose(key_id: str) -> str:
    return f"signing_key|{key_id}"


def _jwk(key: _Key) -> dict[str, str]:
    x = urlsafe_b64encode(key.public).rstrip(b"=").decode()
    return {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": key.id, "use": "sig", "alg": "EdDSA"}
