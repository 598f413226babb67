"""Ways in: registration and login."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import msgspec

from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.kit.errors import Invalid
from whispr.kit.identity import Revocation
from whispr.kit.ids import uuid7
from whispr.services.auth import store
from whispr.services.auth.models import (
    NO_CODES,
    Account,
    Codes,
    DeviceExpired,
    DeviceKeysDiffer,
    Family,
    IdempotencyKeyReused,
    InvalidCredentials,
    NewDevice,
    Origin,
    Tokens,
    UsernameTaken,
)
from whispr.services.auth.service.announcements import Announcer
from whispr.services.auth.service.audit import AuditTrail
from whispr.services.auth.service.credentials import Credentials
from whispr.services.auth.service.expiry import is_remembered
from whispr.services.auth.service.joining import Joining
from whispr.services.auth.service.limits import Limits
from whispr.services.auth.service.prekeys import check_device
from whispr.services.auth.service.second_factor import SecondFactor
from whispr.services.auth.service.sessions import Sessions
from whispr.services.auth.settings import AuthSettings


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A register or login as its repeats are recognised: same name, same Idempotency-Key, same device."""

    username: str
    key_digest: bytes | None
    request_digest: bytes


def _attempt(
    door: str,
    username: str,
    key: str | None,
    device: NewDevice | None,
    device_id: UUID | None = None,
    codes: Codes = NO_CODES,
) -> _Attempt:
    key_digest = None if key is None else hashlib.sha256(f"{door}|{key}".encode()).digest()
    request = msgspec.json.encode([device, device_id, codes])
    return _Attempt(username, key_digest, hashlib.sha256(request).digest())


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a transaction has made, to be answered and announced when it is committed."""

    family: Family
    refresh_token: str
    roles: list[str]
    revocations: list[Revocation]
    epoch: int | None


class _Twin(Exception):
    """The same request, sent twice, has won while this one waited."""


class Entry:
    """Registration and login. Both can be repeated with the same Idempotency-Key."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        credentials: Credentials,
        second_factor: SecondFactor,
        joining: Joining,
        sessions: Sessions,
        announcer: Announcer,
        audit: AuditTrail,
        limits: Limits,
        settings: AuthSettings,
        *,
        ensure_on: Callable[[], None],
    ) -> None:
        self._db = db
        self._clock = clock
        self._credentials = credentials
        self._second_factor = second_factor
        self._joining = joining
        self._sessions = sessions
        self._announcer = announcer
        self._audit = audit
        self._limits = limits
        self._ensure_on = ensure_on
        self._settings = settings

    async def register(
        self,
        username: str,
        password: str,
        device: NewDevice,
        origin: Origin,
        idempotency_key: str | None = None,
    ) -> Tokens:
        """A new account with its first device and session.

        With `idempotency_key`, a repeat gives the same account, device and session with fresh tokens. Raises
        `UsernameTaken`, `BadSignature`, `IdempotencyKeyReused`, `RateLimited`, `Busy`, `FeatureOff`.
        """
        self._ensure_on()
        await self._limits.register(origin)
        check_device(device)
        attempt = _attempt("register", username, idempotency_key, device)
        taken = await self._credentials.find(username)
        if taken is not None:
            return await self._register_again(taken, attempt, password)
        password_hash = await self._credentials.hash(password)
        account_id, opened = uuid7(), None
        async with self._db.transaction() as tx:
            if await store.accounts.insert(tx, account_id, username, password_hash, self._clock.now()):
                if await store.accounts.is_retired(tx, username_digest(username)):
                    raise UsernameTaken
                opened = await self._with_new_device(tx, account_id, device, attempt)
                await self._audit.record(tx, "registered", account_id, opened.family.device_id)
        if opened is None:
            return await self._register_again(await self._credentials.find(username), attempt, password)
        return await self._sessions.tokens(opened.family, opened.refresh_token, opened.roles)

    async def log_in(
        self,
        username: str,
        password: str,
        origin: Origin,
        *,
        device: NewDevice | None = None,
        device_id: UUID | None = None,
        codes: Codes = NO_CODES,
        idempotency_key: str | None = None,
    ) -> Tokens:
        """A new session: on the account's known `device_id`, whose keys nothing changes, else on a new `device`.

        Whatever is wrong with name, password or device id, the answer is `InvalidCredentials` after the same work.
        Raises also `TotpRequiredAtLogin`, `BadTotpCodeAtLogin`, `DeviceExpired`, `TooManyDevices`, `DeviceKeysDiffer`,
        `BadSignature`, `IdempotencyKeyReused`, `RateLimited`, `Busy`.
        """
        if device is None and device_id is None:
            raise Invalid("Either device or device_id is needed.")
        if device is not None:
            check_device(device)
        account = await self._credentials.prove(username, password, origin)
        # The codes too: a repeat is let in without spending a code, so it must know the one that was spent.
        attempt = _attempt("login", username, idempotency_key, device, device_id, codes)
        repeated = await self._repeat(attempt)
        if repeated is not None:
            return repeated
        try:
            opened = await self._open(account, attempt, device, device_id, codes)
        except _Twin:
            repeated = await self._repeat(attempt)
            if repeated is None:
                raise IdempotencyKeyReused from None
            return repeated
        await self._announcer.revoked(opened.revocations)
        if opened.epoch is not None:
            await self._announcer.devices_changed(account.id, opened.epoch)
        return await self._sessions.tokens(opened.family, opened.refresh_token, opened.roles)

    async def _open(
        self,
        account: Account,
        attempt: _Attempt,
        device: NewDevice | None,
        device_id: UUID | None,
        codes: Codes,
    ) -> _Opened:
        opened: _Opened | None = None
        async with self._db.transaction() as tx:
            if not await self._credentials.lock_unchanged(tx, account):
                raise InvalidCredentials
            proof = await self._second_factor.check(tx, account.id, codes, at_login=True)
            if proof.refused is None:
                opened = await self._on_device(tx, account.id, device_id, device, attempt)
                await self._audit.record(
                    tx, "logged_in", account.id, opened.family.device_id, **proof.details
                )
        if proof.refused is not None:
            raise proof.refused
        assert opened is not None
        return opened

    async def _on_device(
        self,
        tx: Connection,
        account_id: UUID,
        device_id: UUID | None,
        device: NewDevice | None,
        attempt: _Attempt,
    ) -> _Opened:
        if device_id is not None:
            return await self._on_known_device(tx, account_id, device_id, device, attempt)
        assert device is not None
        await self._joining.check_room(tx, account_id)
        opened = await self._with_new_device(tx, account_id, device, attempt)
        await self._audit.record(tx, "device_added", account_id, opened.family.device_id)
        return opened

    async def _on_known_device(
        self, tx: Connection, account_id: UUID, device_id: UUID, device: NewDevice | None, attempt: _Attempt
    ) -> _Opened:
        known = await store.devices.by_id(tx, device_id)
        if known is None or known.account_id != account_id:
            raise InvalidCredentials
        if not known.active:
            raise DeviceExpired if is_remembered(known, self._clock.now()) else InvalidCredentials
        if device is not None and (device.identity_key, device.signing_key) != (
            known.identity_key,
            known.signing_key,
        ):
            raise DeviceKeysDiffer
        family, token, revocations = await self._sessions.open(tx, account_id, device_id)
        await self._remember(tx, attempt, family.session_id)
        await store.devices.seen(tx, device_id, self._clock.now().date())
        roles = await store.accounts.roles(tx, account_id)
        return _Opened(family, token, roles, revocations, None)

    async def _with_new_device(
        self, tx: Connection, account_id: UUID, device: NewDevice, attempt: _Attempt
    ) -> _Opened:
        joined = await self._joining.join(tx, account_id, device)
        await self._remember(tx, attempt, joined.family.session_id)
        roles = await store.accounts.roles(tx, account_id)
        return _Opened(joined.family, joined.refresh_token, roles, joined.revocations, joined.epoch)

    async def _remember(self, tx: Connection, attempt: _Attempt, session_id: UUID) -> None:
        if attempt.key_digest is None:
            return
        await store.sessions.forget_key(tx, attempt.username, attempt.key_digest, self._remembered_since())
        if not await store.sessions.remember_key(
            tx, attempt.username, attempt.key_digest, attempt.request_digest, session_id, self._clock.now()
        ):
            raise _Twin

    async def _register_again(self, account: Account | None, attempt: _Attempt, password: str) -> Tokens:
        """A register for a name that is taken: perhaps by this very request, sent before."""
        if account is None or attempt.key_digest is None:
            raise UsernameTaken
        async with self._db.connection() as connection:
            known = await store.sessions.session_of_key(
                connection, attempt.username, attempt.key_digest, self._remembered_since()
            )
        if known is None or not await self._credentials.matches(account, password):
            raise UsernameTaken
        tokens = await self._repeat(attempt)
        if tokens is None:
            raise UsernameTaken
        return tokens

    async def _repeat(self, attempt: _Attempt) -> Tokens | None:
        """Fresh tokens for the session this Idempotency-Key has made; None if it has made none.

        The refresh token of the first answer stays good beside the new one: which of the two answers the device got
        is not known here.
        """
        if attempt.key_digest is None:
            return None
        async with self._db.transaction() as tx:
            known = await store.sessions.session_of_key(
                tx, attempt.username, attempt.key_digest, self._remembered_since()
            )
            if known is None:
                return None
            family = await store.sessions.lock_family(tx, known["session_id"])
            if (
                known["request_digest"] != attempt.request_digest
                or family is None
                or family.revoked_at is not None
            ):
                raise IdempotencyKeyReused
            refresh_token = await self._sessions.new_token(tx, family)
            roles = await store.accounts.roles(tx, family.account_id)
        return await self._sessions.tokens(family, refresh_token, roles)

    def _remembered_since(self) -> datetime:
        return self._clock.now() - timedelta(seconds=self._settings.idempotency_seconds)


def username_digest(username: str) -> bytes:
    """What stays of a name that is retired."""
    return hashlib.sha256(b"whispr retired username|" + username.encode()).digest()
