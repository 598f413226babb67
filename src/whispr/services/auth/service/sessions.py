"""Sessions: each is a family of refresh tokens bound to one device. A token works once; its reuse ends the family.

A refresh token is `session id ‖ 32 random bytes ‖ tag`. Only its digest is stored. The tag proves that the token was
once issued in this family, so that a token whose row is long gone is still recognised as reused when it comes back.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.kit.errors import SessionRevoked
from whispr.kit.identity import Caller, Revocation
from whispr.kit.ids import uuid7
from whispr.services.auth import store
from whispr.services.auth.models import (
    DEVICE_EXPIRED,
    DeviceExpired,
    Family,
    InvalidRefreshToken,
    Origin,
    RefreshRecord,
    RefreshReused,
    RefreshTokenExpired,
    SessionNotFound,
    SessionRecord,
    Subject,
    Tokens,
)
from whispr.services.auth.service.announcements import Announcer
from whispr.services.auth.service.audit import AuditTrail
from whispr.services.auth.service.limits import Limits
from whispr.services.auth.service.signing import SigningKeys
from whispr.services.auth.service.vault import open_under, seal_under
from whispr.services.auth.settings import AuthSettings

_SUCCESSOR = b"whispr refresh successor"
_ID_BYTES, _RANDOM_BYTES, _TAG_BYTES = 16, 32, 16


class Sessions:
    """Opens, refreshes, lists and ends sessions."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        signing: SigningKeys,
        announcer: Announcer,
        audit: AuditTrail,
        limits: Limits,
        settings: AuthSettings,
    ) -> None:
        self._db = db
        self._clock = clock
        self._signing = signing
        self._announcer = announcer
        self._audit = audit
        self._limits = limits
        self._settings = settings
        self._lifetime = timedelta(seconds=settings.refresh_token_seconds)

    # --- within a caller's transaction ---

    async def open(
        self, tx: Connection, account_id: UUID, device_id: UUID
    ) -> tuple[Family, str, list[Revocation]]:
        """A new session with its first refresh token, and revocations to announce once this is committed.

        A device keeps its newest `max_sessions_per_device`; without a bound a client that logs in on every start
        would leave thousands behind.
        """
        now = self._clock.now()
        family = Family(uuid7(), account_id, device_id, secrets.token_bytes(32), now + self._lifetime)
        await store.sessions.insert(tx, family, now)
        token = await self.new_token(tx, family)
        living = await store.sessions.live_of_device(tx, device_id, now)
        surplus = living[self._settings.max_sessions_per_device :]
        return family, token, await self.revoke(tx, surplus, "superseded")

    async def new_token(self, tx: Connection, family: Family) -> str:
        """One more refresh token of a living family."""
        token = _make_token(family)
        now = self._clock.now()
        await store.sessions.add_refresh_token(
            tx, _digest(token), family.session_id, now, now + self._lifetime
        )
        return _encode(token)

    async def revoke(self, tx: Connection, session_ids: Sequence[UUID], reason: str) -> list[Revocation]:
        """End sessions; the revocations to announce once this is committed."""
        if not session_ids:
            return []
        now = self._clock.now()
        ended = await store.sessions.revoke(tx, session_ids, reason, now)
        await store.sessions.add_revocations(tx, Subject.SESSION, ended, now)
        return [Revocation(subject="session", id=session_id, at=now) for session_id in ended]

    async def tokens(self, family: Family, refresh_token: str, roles: Sequence[str]) -> Tokens:
        """What the device gets, with a fresh access token."""
        access_token = await self._signing.access_token(
            family.account_id, family.device_id, family.session_id, roles
        )
        return Tokens(
            user_id=family.account_id,
            device_id=family.device_id,
            session_id=family.session_id,
            access_token=access_token,
            expires_in=self._settings.access_token_seconds,
            refresh_token=refresh_token,
        )

    # --- the rules ---

    async def refresh(self, refresh_token: str, device_id: UUID | None, origin: Origin) -> Tokens:
        """Fresh tokens for a refresh token, which is spent by it.

        The token just spent gives the same successor again for `refresh_grace_seconds`, as long as the successor was
        not used: the answer may have been lost. Any other use of a spent token, or from another device than the
        session's where the caller names one, ends the family and raises `RefreshReused`. Raises `DeviceExpired` for a
        year after the device was away for too long.
        """
        await self._limits.refresh(origin)
        token = _decode(refresh_token)
        async with self._db.transaction() as tx:
            family = await store.sessions.lock_family(tx, UUID(bytes=token[:_ID_BYTES]))
            if family is None or not hmac.compare_digest(_tag(family, token), token[-_TAG_BYTES:]):
                raise InvalidRefreshToken
            if family.revoked_at is not None:
                raise DeviceExpired if family.revoke_reason == DEVICE_EXPIRED else SessionRevoked
            successor: str | None = None
            roles: list[str] = []
            revocations: list[Revocation] = []
            if device_id is None or device_id == family.device_id:
                successor = await self._succeed(tx, family, token)
            if successor is None:
                revocations = await self.revoke(tx, [family.session_id], "refresh_reused")
                await self._audit.record(
                    tx,
                    "refresh_reused",
                    family.account_id,
                    family.device_id,
                    session_id=str(family.session_id),
                )
            else:
                roles = await store.accounts.roles(tx, family.account_id)
        if successor is None:
            await self._announcer.revoked(revocations)
            raise RefreshReused
        return await self.tokens(family, successor, roles)

    async def page(self, caller: Caller, after: UUID | None, limit: int) -> list[SessionRecord]:
        """The caller's living sessions, oldest first."""
        async with self._db.connection() as connection:
            return await store.sessions.page(connection, caller.user_id, self._clock.now(), after, limit)

    async def end(self, caller: Caller, session_id: UUID, reason: str = "ended_by_owner") -> None:
        """End one of the caller's sessions; ending it again changes nothing. Raises `SessionNotFound`."""
        async with self._db.transaction() as tx:
            if await store.sessions.owner(tx, session_id) != caller.user_id:
                raise SessionNotFound
            revocations = await self.revoke(tx, [session_id], reason)
            if revocations:
                await self._audit.record(
                    tx,
                    "session_ended",
                    caller.user_id,
                    caller.device_id,
                    session_id=str(session_id),
                    reason=reason,
                )
        await self._announcer.revoked(revocations)

    async def log_out(self, caller: Caller) -> None:
        """End the caller's own session. A device left without one gets no pushes any more."""
        async with self._db.transaction() as tx:
            revocations = await self.revoke(tx, [caller.session_id], "logout")
            dropped = False
            if not await store.sessions.live_of_device(tx, caller.device_id, self._clock.now()):
                dropped = await store.push_tokens.remove(tx, caller.device_id)
            if revocations:
                await self._audit.record(
                    tx, "logged_out", caller.user_id, caller.device_id, session_id=str(caller.session_id)
                )
        await self._announcer.revoked(revocations)
        if dropped:
            await self._announcer.tokens_changed(caller.user_id)

    async def is_live(self, session_id: UUID) -> bool:
        """The answer from the source: has this session neither ended nor expired?"""
        async with self._db.connection() as connection:
            return await store.sessions.is_live(connection, session_id, self._clock.now())

    async def _succeed(self, tx: Connection, family: Family, token: bytes) -> str | None:
        """The successor of `token`; None if it was used before and may not be used again."""
        now = self._clock.now()
        record = await store.sessions.refresh_token(tx, _digest(token))
        if record is None:
            return None
        if record.used_at is not None:
            return await self._repeat(tx, record, token)
        if record.expires_at <= now or family.expires_at <= now:
            raise RefreshTokenExpired
        successor = _make_token(family)
        await store.sessions.add_refresh_token(
            tx, _digest(successor), family.session_id, now, now + self._lifetime
        )
        sealed = seal_under(token, successor, _SUCCESSOR)
        await store.sessions.spend_refresh_token(tx, _digest(token), _digest(successor), sealed, now)
        await store.sessions.used(tx, family.session_id, now, now + self._lifetime)
        await store.devices.seen(tx, family.device_id, now.date())
        return _encode(successor)

    async def _repeat(self, tx: Connection, record: RefreshRecord, token: bytes) -> str | None:
        assert record.used_at is not None
        assert record.successor_digest is not None
        assert record.successor_sealed is not None
        grace = timedelta(seconds=self._settings.refresh_grace_seconds)
        if self._clock.now() - record.used_at > grace:
            return None
        successor = await store.sessions.refresh_token(tx, record.successor_digest)
        # Whoever used the successor had the answer; a second holder of its predecessor is someone else.
        if successor is None or successor.used_at is not None:
            return None
        return _encode(open_under(token, record.successor_sealed, _SUCCESSOR))


def _make_token(family: Family) -> bytes:
    token = family.session_id.bytes + secrets.token_bytes(_RANDOM_BYTES)
    return token + _tag(family, token)


def _tag(family: Family, token: bytes) -> bytes:
    body = token[: _ID_BYTES + _RANDOM_BYTES]
    return hmac.digest(family.family_key, body, "sha256")[:_TAG_BYTES]


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _encode(token: bytes) -> str:
    return urlsafe_b64encode(token).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        token = urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except (Base64Error, ValueError):
        raise InvalidRefreshToken from None
    # Python skips characters that are no base64: two spellings of a token must not both be the token.
    if len(token) != _ID_BYTES + _RANDOM_BYTES + _TAG_BYTES or _encode(token) != text:
        raise InvalidRefreshToken
    return token
