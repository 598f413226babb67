"""The second factor: time-based codes of an authenticator (RFC 6238), and recovery codes for the day it is lost."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from base64 import b32encode
from datetime import timedelta
from uuid import UUID

from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.twofactor.totp import TOTP

from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.kit.errors import Failure
from whispr.kit.identity import Caller
from whispr.kit.telemetry import get_logger
from whispr.services.auth import store
from whispr.services.auth.models import (
    BadTotpCode,
    BadTotpCodeAtLogin,
    Codes,
    NewSecret,
    Proof,
    SecondFactorRecord,
    SecondFactorState,
    TotpEnabled,
    TotpLocked,
    TotpNotBegun,
    TotpRequired,
    TotpRequiredAtLogin,
)
from whispr.services.auth.service.audit import AuditTrail
from whispr.services.auth.service.credentials import Credentials
from whispr.services.auth.service.data_keys import DataKeys
from whispr.services.auth.service.vault import Unreadable
from whispr.services.auth.settings import AuthSettings

log = get_logger(__name__)

STEP_SECONDS = 30
DIGITS = 6
RECOVERY_CODES = 10

_SECRET_BYTES = 20
_RECOVERY_BYTES = 10

# With a window of three codes, five guesses and then one an hour at most find a code about once in 40 years.
_FREE_FAILURES = 5
_FIRST_LOCK = timedelta(minutes=1)
_LONGEST_LOCK = timedelta(hours=1)

# A confirmation whose answer was lost may be repeated for as long: nobody has seen its recovery codes.
_REPEATABLE = timedelta(minutes=2)


class SecondFactor:
    """Sets it up, asks for it, takes it away. A code is spent in the transaction of what it allows, and works once."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        credentials: Credentials,
        data_keys: DataKeys,
        audit: AuditTrail,
        settings: AuthSettings,
    ) -> None:
        self._db = db
        self._clock = clock
        self._credentials = credentials
        self._data_keys = data_keys
        self._audit = audit
        self._settings = settings

    # --- within a caller's transaction ---

    async def check(self, tx: Connection, account_id: UUID, codes: Codes, *, at_login: bool = False) -> Proof:
        """Do `codes` prove the second factor of the account, which `tx` has locked, or is there none?

        A refusal is not raised, because a wrong code is counted in `tx`: commit it, then raise. What is allowed is
        recorded by the caller, as the last step of `tx`.
        """
        factor = await store.second_factors.lock(tx, account_id)
        if factor is None or factor.confirmed_at is None:
            return Proof()
        if codes.totp_code is not None:
            used, refused = "totp", await self._try_code(tx, account_id, factor, codes.totp_code)
        elif codes.recovery_code is not None:
            used = "recovery_code"
            refused = await self._try_recovery_code(tx, account_id, factor, codes.recovery_code)
        else:
            return Proof(TotpRequiredAtLogin() if at_login else TotpRequired())
        if at_login and isinstance(refused, BadTotpCode):
            refused = BadTotpCodeAtLogin()
        return Proof(refused, {"second_factor": used})

    # --- the rules ---

    async def begin(self, caller: Caller, password: str, idempotency_key: str | None = None) -> NewSecret:
        """A new secret; the second factor is asked for once a code of it was confirmed.

        Begun again before that, the older secret is forgotten; with the same `idempotency_key` it is given again.
        Raises `WrongPassword`, `TotpEnabled`, `RateLimited`, `Busy`.
        """
        account = await self._credentials.prove_owner(caller, password)
        request = _request_digest(account.id, idempotency_key)
        async with self._db.transaction() as tx:
            await self._credentials.lock_proven(tx, account)
            factor = await store.second_factors.lock(tx, account.id)
            if factor is not None and factor.confirmed_at is not None:
                raise TotpEnabled
            if factor is not None and request is not None and request == factor.request_digest:
                secret = await self._secret(tx, account.id, factor)
            else:
                secret = secrets.token_bytes(_SECRET_BYTES)
                key = await self._data_keys.current(tx)
                encrypted = self._data_keys.encrypt(key, secret, _purpose(account.id))
                await store.second_factors.put(tx, account.id, encrypted, request, self._clock.now())
        name = account.username or str(account.id)
        uri = _totp(secret).get_provisioning_uri(name, self._settings.totp_issuer)
        return NewSecret(b32encode(secret).decode(), uri)

    async def confirm(self, caller: Caller, code: str) -> list[str]:
        """Turn the second factor on; the recovery codes, which nobody is shown again.

        The same code again within two minutes gives fresh recovery codes: the answer may have been lost. Raises
        `TotpNotBegun`, `TotpEnabled`, `BadTotpCode`, `TotpLocked`.
        """
        account_id, now, recovery_codes = caller.user_id, self._clock.now(), _recovery_codes()
        async with self._db.transaction() as tx:
            factor = await store.second_factors.lock(tx, account_id)
            if factor is None:
                raise TotpNotBegun
            refused: Failure | None = None
            if factor.confirmed_at is not None:
                step = await self._matching_step(tx, account_id, factor, code)
                if step != factor.last_step or now - factor.confirmed_at > _REPEATABLE:
                    raise TotpEnabled
            else:
                refused = await self._try_code(tx, account_id, factor, code)
            if refused is None:
                await store.second_factors.confirm(tx, account_id, now)
                digests = [_recovery_digest(account_id, item) for item in recovery_codes]
                await store.second_factors.replace_recovery_codes(tx, account_id, digests)
                await self._audit.record(tx, "second_factor_on", account_id, caller.device_id)
        if refused is not None:
            raise refused
        return recovery_codes

    async def remove(self, caller: Caller, password: str, code: str) -> None:
        """Turn the second factor off, by one of its codes or a recovery code; again changes nothing.

        Raises `WrongPassword`, `BadTotpCode`, `TotpLocked`, `RateLimited`, `Busy`.
        """
        account = await self._credentials.prove_owner(caller, password)
        codes = Codes(totp_code=code) if re.fullmatch(r"[0-9]{6}", code) else Codes(recovery_code=code)
        async with self._db.transaction() as tx:
            await self._credentials.lock_proven(tx, account)
            factor = await store.second_factors.lock(tx, account.id)
            proof = await self.check(tx, account.id, codes)
            if factor is not None and proof.refused is None:
                await store.second_factors.remove(tx, account.id)
                await self._audit.record(
                    tx, "second_factor_off", account.id, caller.device_id, **proof.details
                )
        if proof.refused is not None:
            raise proof.refused

    async def state(self, caller: Caller) -> SecondFactorState:
        """Is it on, and how many recovery codes are left?"""
        async with self._db.connection() as connection:
            return await store.second_factors.state(connection, caller.user_id)

    async def reencrypt(self) -> None:
        """Bring every secret under the newest data key. One that does not open stays where it is, as its key does."""
        after: UUID | None = None
        while True:
            async with self._db.transaction() as tx:
                ring, newest = await self._data_keys.ring(tx), await self._data_keys.current(tx)
                rows = await store.second_factors.lock_under_old_keys(
                    tx, newest.id, after, self._settings.reencrypt_batch
                )
                for account_id, encrypted in rows:
                    try:
                        secret = self._data_keys.decrypt(ring, encrypted, _purpose(account_id))
                    except Unreadable:
                        log.exception("second_factor_unreadable", user_id=str(account_id))
                        continue
                    moved = self._data_keys.encrypt(newest, secret, _purpose(account_id))
                    await store.second_factors.reseal(tx, account_id, moved)
            if not rows:
                return
            after = rows[-1][0]

    async def _try_code(
        self, tx: Connection, account_id: UUID, factor: SecondFactorRecord, code: str
    ) -> Failure | None:
        now = self._clock.now()
        if factor.locked_until is not None and now < factor.locked_until:
            return TotpLocked(retry_after=(factor.locked_until - now).total_seconds())
        step = await self._matching_step(tx, account_id, factor, code)
        if step is None or step <= factor.last_step:
            return await self._refuse(tx, account_id, factor)
        await store.second_factors.accept(tx, account_id, step)
        return None

    async def _try_recovery_code(
        self, tx: Connection, account_id: UUID, factor: SecondFactorRecord, code: str
    ) -> Failure | None:
        # Not under the lock: 80 bits are not guessed, and whoever knows the password could lock the owner out.
        if not await store.second_factors.spend_recovery_code(
            tx, account_id, _recovery_digest(account_id, code)
        ):
            return await self._refuse(tx, account_id, factor)
        await store.second_factors.accept(tx, account_id, factor.last_step)
        return None

    async def _refuse(self, tx: Connection, account_id: UUID, factor: SecondFactorRecord) -> Failure:
        surplus = factor.failures + 1 - _FREE_FAILURES
        locked_until = None
        if surplus >= 0:
            locked_until = self._clock.now() + min(_FIRST_LOCK * 2 ** min(surplus, 10), _LONGEST_LOCK)
        await store.second_factors.count_failure(tx, account_id, locked_until)
        await self._audit.record(tx, "second_factor_failed", account_id)
        return BadTotpCode()

    async def _matching_step(
        self, tx: Connection, account_id: UUID, factor: SecondFactorRecord, code: str
    ) -> int | None:
        """The time step `code` belongs to, the present one or a neighbour: clocks and fingers are slow."""
        totp = _totp(await self._secret(tx, account_id, factor))
        present = int(self._clock.time()) // STEP_SECONDS
        found = None
        for step in (present - 1, present, present + 1):
            if hmac.compare_digest(totp.generate(step * STEP_SECONDS), code.encode()):
                found = step
        return found

    async def _secret(self, tx: Connection, account_id: UUID, factor: SecondFactorRecord) -> bytes:
        ring = await self._data_keys.ring(tx)
        return self._data_keys.decrypt(ring, factor.encrypted, _purpose(account_id))


def _totp(secret: bytes) -> TOTP:
    # SHA-1 because it is the only hash that all authenticators know; as a MAC it is sound.
    return TOTP(secret, DIGITS, SHA1(), STEP_SECONDS)  # noqa: S303


def _purpose(account_id: UUID) -> str:
    return f"{account_id}|totp"


def _request_digest(account_id: UUID, idempotency_key: str | None) -> bytes | None:
    if idempotency_key is None:
        return None
    return hashlib.sha256(account_id.bytes + idempotency_key.encode()).digest()


def _recovery_codes() -> list[str]:
    texts = [b32encode(secrets.token_bytes(_RECOVERY_BYTES)).decode() for _ in range(RECOVERY_CODES)]
    return ["-".join(text[start : start + 4] for start in range(0, len(text), 4)) for text in texts]


def _recovery_digest(account_id: UUID, code: str) -> bytes:
    typed = code.upper().replace("-", "").replace(" ", "")
    return hashlib.sha256(b"whispr recovery code|" + account_id.bytes + typed.encode()).digest()
