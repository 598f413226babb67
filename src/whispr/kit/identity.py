"""Who is calling: access tokens verified offline against the keys of auth, with revocation pushed to every process.

A token is proof by itself; nobody is asked. What cannot be in a token, that its session was ended since, arrives as a hint
over Valkey within milliseconds and, should the hint be lost, by asking auth every few seconds. Revocations are held only as
long as a token could outlive them.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol
from uuid import UUID

import msgspec
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from whispr.kit.cache import Cache
from whispr.kit.clock import Clock
from whispr.kit.errors import Failure, InvalidToken, SessionRevoked, TokenExpired, Unavailable
from whispr.kit.ids import swift
from whispr.kit.telemetry import get_logger, metrics

REVOCATIONS_CHANNEL = "auth:revocations"

MAX_TOKEN_LIFETIME = 3600.0
"""Seconds. A token valid for longer is refused: it could outlive the memory of its revocation."""

LEEWAY = 10.0
"""Seconds by which another machine's clock may be ahead of ours when it issues a token."""

# Seconds after which no token issued before a revocation can still be valid.
_RETENTION = MAX_TOKEN_LIFETIME + LEEWAY

_MAX_TOKEN_CHARS = 4096
_MAX_KEYS = 32
_MAX_ROLES = 16
_VERIFIED_TOKENS = 16_384

# Revocations are asked for again from this long before the last answer: one that was committed late, or stamped by a clock
# behind ours, must not fall between two polls.
_OVERLAP = timedelta(seconds=60)

# A stranger can make up key ids. Each could make us ask auth; this bounds how often (seconds).
_LOOK_SPACING = 5.0

# Deadline in seconds of one question to the source, whatever deadline the source itself keeps.
_SOURCE_TIMEOUT = 5.0

_RETRY = (0.5, 1.0, 2.0, 5.0)

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """The person and device a request comes from. `issued_at` and `expires_at` are seconds since the epoch."""

    user_id: UUID
    device_id: UUID
    session_id: UUID
    roles: frozenset[str]
    issued_at: float
    expires_at: float


class Revocation(msgspec.Struct, frozen=True):
    """Tokens of `subject` `id` issued at or before `at` are refused; those of a session always, it never comes back."""

    subject: Literal["session", "device", "user"]
    id: UUID
    at: datetime


class IdentitySource(Protocol):
    """Where keys and revocations come from: auth itself, or a client of it."""

    async def jwks(self) -> dict[str, Any]:
        """The key set as at `/.well-known/jwks.json`."""

    async def revocations(self, since: datetime) -> list[Revocation]:
        """Everything revoked at or after `since`."""


class IdentityUnavailable(Unavailable):
    """Tokens cannot be checked yet. Try again."""

    code = "identity_unavailable"

    def __init__(self) -> None:
        super().__init__(retry_after=1)


class _UnknownKey(InvalidToken):
    """The access token is not valid."""


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    # `crit`, `jku`, `jwk`, `x5u` and whatever else would tell us how to believe the token are unknown fields here.
    alg: Literal["EdDSA"]
    kid: str
    typ: Literal["JWT", "at+jwt"] = "JWT"


class _Claims(msgspec.Struct):
    iss: str
    aud: str | list[str]
    sub: UUID
    did: UUID
    sid: UUID
    iat: float
    nbf: float
    exp: float
    roles: list[str] = []


class _Verified(msgspec.Struct, frozen=True, gc=False):
    caller: Caller
    kid: str


_decode_header = msgspec.json.Decoder(_Header).decode
_decode_claims = msgspec.json.Decoder(_Claims).decode
_decode_revocation = msgspec.json.Decoder(Revocation).decode

_count_ok = metrics.tokens_verified.labels("ok")


def encode_revocation(revocation: Revocation) -> bytes:
    """The form of `revocation` on `REVOCATIONS_CHANNEL`."""
    return msgspec.json.encode(revocation)


class Identity:
    """Verifies access tokens. `run()` is the supervised loop that keeps keys and revocations current.

    `issuer` and `audience` are what `iss` and `aud` must be. `poll_interval` and `jwks_interval` are in seconds.
    """

    def __init__(
        self,
        source: IdentitySource,
        cache: Cache,
        clock: Clock,
        issuer: str = "whispr",
        audience: str = "whispr",
        *,
        poll_interval: float = 15.0,
        jwks_interval: float = 300.0,
    ) -> None:
        self._source = source
        self._cache = cache
        self._clock = clock
        self._issuer = issuer
        self._audience = audience
        self._poll_interval = poll_interval
        self._jwks_interval = jwks_interval
        self._keys: dict[str, VerifyKey] = {}
        self._verified: OrderedDict[str, _Verified] = OrderedDict()
        self._revoked: dict[str, dict[UUID, float]] = {"session": {}, "device": {}, "user": {}}
        self._listeners: list[Callable[[Revocation], None]] = []
        self._polled_until: datetime | None = None
        self._looked_at = float("-inf")
        self._looking = asyncio.Lock()
        self._want_keys = asyncio.Event()
        self._want_poll = asyncio.Event()
        self._started = False

    async def start(self) -> None:
        """Listen for hints and fetch keys and revocations once. An absent source is not an error: `run` tries again."""
        if not self._started:
            self._started = True
            self._cache.subscribe(REVOCATIONS_CHANNEL, self._hinted)
            self._cache.on_reconnect(self._want_poll.set)
        if not await self._refresh():
            self._want_keys.set()
        if not await self._poll():
            self._want_poll.set()

    async def ready(self) -> None:
        """A check of readiness: raises `IdentityUnavailable` until keys and revocations have been read once."""
        if not self._keys or self._polled_until is None:
            raise IdentityUnavailable

    def verify(self, token: str) -> Caller:
        """The caller that `token` proves, without asking anyone.

        Raises `InvalidToken`, `TokenExpired`, `SessionRevoked`, or `IdentityUnavailable` while keys and revocations have
        never been read (a client must not throw its token away because we have just started).
        """
        try:
            caller = self._verify(token)
        except Failure as failure:
            metrics.tokens_verified.labels(failure.code).inc()
            raise
        _count_ok.inc()
        return caller

    async def verify_async(self, token: str) -> Caller:
        """`verify`, but a key that is not known yet is looked for at the source first."""
        try:
            return self.verify(token)
        except (_UnknownKey, IdentityUnavailable):
            async with self._looking:
                # One look serves all who wait here, and the spacing bounds what strangers can cause with made-up ids.
                now = asyncio.get_running_loop().time()
                if now - self._looked_at >= (_LOOK_SPACING if self._keys else _RETRY[0]):
                    self._looked_at = now
                    await self._refresh()
                    if self._polled_until is None:
                        await self._poll()
        return self.verify(token)

    def revoked(self, caller: Caller) -> bool:
        """Whether what `caller` was verified by has been revoked since: for connections that outlive their first request."""
        revoked, never = self._revoked, float("-inf")
        return (
            caller.session_id in revoked["session"]
            or caller.issued_at <= revoked["device"].get(caller.device_id, never)
            or caller.issued_at <= revoked["user"].get(caller.user_id, never)
        )

    def on_revocation(self, callback: Callable[[Revocation], None]) -> None:
        """Call `callback` once for each revocation as it becomes known. It must not block."""
        self._listeners.append(callback)

    def learn(self, revocation: Revocation, way: Literal["push", "poll", "local"] = "local") -> None:
        """Take note of `revocation`; knowing it already changes nothing."""
        at = revocation.at.timestamp()
        known = self._revoked[revocation.subject]
        if at <= known.get(revocation.id, float("-inf")) or at < self._clock.time() - _RETENTION:
            return
        known[revocation.id] = at
        metrics.revocations_learned.labels(way).inc()
        for callback in self._listeners:
            try:
                callback(revocation)
            except Exception:
                # The other listeners still have sockets to close.
                log.exception("revocation_listener_failed", subject_kind=revocation.subject)

    async def run(self) -> None:
        """The supervised loop: revocations every `poll_interval` and after a lost subscription, keys every `jwks_interval`."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(
                _repeat(self._refresh, self._want_keys, self._jwks_interval, spacing=_LOOK_SPACING)
            )
            tasks.create_task(_repeat(self._poll, self._want_poll, self._poll_interval, spacing=_RETRY[0]))

    def _verify(self, token: str) -> Caller:
        verified = self._verified.get(token)
        if verified is None:
            if not self._keys or self._polled_until is None:
                raise IdentityUnavailable
            verified = self._check(token)
            self._verified[token] = verified
            if len(self._verified) > _VERIFIED_TOKENS:
                self._verified.popitem(last=False)
        else:
            self._verified.move_to_end(token)
        if self._clock.time() >= verified.caller.expires_at:
            del self._verified[token]
            raise TokenExpired
        if self.revoked(verified.caller):
            raise SessionRevoked
        return verified.caller

    def _check(self, token: str) -> _Verified:
        """Everything about `token` that does not change with time. Says "invalid" and no more, whatever is wrong."""
        if len(token) > _MAX_TOKEN_CHARS or token.count(".") != 2:
            raise InvalidToken
        signed, _, signature = token.rpartition(".")
        head, _, body = signed.partition(".")
        try:
            header = _decode_header(_unbase64(head))
            key = self._keys.get(header.kid)
            if key is None:
                self._want_keys.set()
                raise _UnknownKey
            key.verify(signed.encode("ascii"), _unbase64(signature))
            claims = _decode_claims(_unbase64(body))
        except (ValueError, TypeError, RecursionError, BadSignatureError, msgspec.MsgspecError):
            raise InvalidToken from None
        self._check_claims(claims)
        caller = Caller(
            user_id=swift(claims.sub),
            device_id=swift(claims.did),
            session_id=swift(claims.sid),
            roles=frozenset(claims.roles),
            issued_at=claims.iat,
            expires_at=claims.exp,
        )
        return _Verified(caller, header.kid)

    def _check_claims(self, claims: _Claims) -> None:
        latest = self._clock.time() + LEEWAY
        audiences = [claims.aud] if isinstance(claims.aud, str) else claims.aud
        if (
            claims.iss != self._issuer
            or self._audience not in audiences
            or claims.nbf > latest
            or claims.iat > latest
            or not claims.iat < claims.exp <= claims.iat + MAX_TOKEN_LIFETIME
            or len(claims.roles) > _MAX_ROLES
        ):
            raise InvalidToken

    async def _refresh(self) -> bool:
        """Fetch the keys; whether that worked. On failure those we have stay."""
        try:
            async with asyncio.timeout(_SOURCE_TIMEOUT):
                keys = _read_keys(await self._source.jwks())
        except Exception as error:  # noqa: BLE001 (a source may fail in any way)
            metrics.jwks_refreshes.labels("failed").inc()
            log.warning("jwks_refresh_failed", error=type(error).__name__)
            return False
        metrics.jwks_refreshes.labels("ok").inc()
        if keys != self._keys:
            # A key that left the set, or changed under its id, was withdrawn: what it signed is no longer proven.
            for token, verified in list(self._verified.items()):
                if keys.get(verified.kid) != self._keys.get(verified.kid):
                    del self._verified[token]
            self._keys = keys
        return True

    async def _poll(self) -> bool:
        """Ask for revocations since the last answer; whether there was an answer."""
        began = self._clock.now()
        since = (self._polled_until or began - timedelta(seconds=_RETENTION)) - _OVERLAP
        try:
            async with asyncio.timeout(_SOURCE_TIMEOUT):
                revocations = await self._source.revocations(since)
        except Exception as error:  # noqa: BLE001 (as above; hints go on arriving meanwhile)
            log.warning("revocation_poll_failed", error=type(error).__name__)
            return False
        for revocation in revocations:
            self.learn(revocation, "poll")
        self._polled_until = began
        self._forget()
        return True

    def _forget(self) -> None:
        oldest = self._clock.time() - _RETENTION
        for known in self._revoked.values():
            for subject in [subject for subject, at in known.items() if at < oldest]:
                del known[subject]

    def _hinted(self, message: bytes) -> None:
        try:
            revocation = _decode_revocation(message)
            if revocation.at.tzinfo is None:
                revocation = msgspec.structs.replace(revocation, at=revocation.at.replace(tzinfo=UTC))
        except (msgspec.MsgspecError, ValueError):
            log.warning("revocation_hint_malformed", size=len(message))
            self._want_poll.set()
            return
        self.learn(revocation, "push")


async def _repeat(
    step: Callable[[], Awaitable[bool]], wanted: asyncio.Event, interval: float, *, spacing: float
) -> None:
    """Run `step` every `interval` seconds; sooner, but for `spacing`, when `wanted` is set or the last run failed."""
    loop = asyncio.get_running_loop()
    failures, last = 0, float("-inf")
    while True:
        delay = interval if failures == 0 else min(interval, _RETRY[min(failures, len(_RETRY)) - 1])
        try:
            async with asyncio.timeout(delay):
                await wanted.wait()
        except TimeoutError:
            pass
        else:
            await asyncio.sleep(max(0.0, last + min(spacing, delay) - loop.time()))
        wanted.clear()
        last = loop.time()
        failures = 0 if await step() else failures + 1


def _unbase64(part: str) -> bytes:
    """Decode unpadded base64url, refusing other spellings of the same bytes. Raises ValueError."""
    encoded = part.encode("ascii")
    try:
        decoded = base64.urlsafe_b64decode(encoded + b"=" * (-len(encoded) % 4))
    except binascii.Error as error:
        raise ValueError("not base64url") from error
    if base64.urlsafe_b64encode(decoded).rstrip(b"=") != encoded:
        raise ValueError("not canonical base64url")
    return decoded


def _read_keys(jwks: Mapping[str, Any]) -> dict[str, VerifyKey]:
    """The Ed25519 signing keys of a key set by id. Raises ValueError if there is none: that is a fault, not a rotation."""
    keys: dict[str, VerifyKey] = {}
    for jwk in list(jwks.get("keys", ()))[:_MAX_KEYS]:
        if jwk.get("kty") != "OKP" or jwk.get("crv") != "Ed25519" or jwk.get("use", "sig") != "sig":
            continue
        if jwk.get("alg", "EdDSA") != "EdDSA" or not isinstance(jwk.get("kid"), str):
            continue
        keys[jwk["kid"]] = VerifyKey(_unbase64(jwk["x"]))
    if not keys:
        raise ValueError("The key set holds no usable key.")
    return keys
