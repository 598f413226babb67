"""Linking a new device: begun and confirmed on a device one has, claimed and finished on the new one.

The token travels from screen to camera and may be seen by others. So it only serves to claim: what was claimed is shown
on both screens as a code of its keys, and the session is given to whoever signs with the claimed signing key.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from uuid import UUID

import msgspec
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.kit.identity import Caller
from whispr.kit.ids import uuid7
from whispr.services.auth import store
from whispr.services.auth.models import (
    BadSignature,
    ClaimedLink,
    Codes,
    Family,
    Link,
    LinkExpired,
    LinkNotClaimed,
    LinkNotFound,
    LinkRefused,
    LinkStatus,
    LinkUsed,
    NewDevice,
    NewLink,
    Origin,
    Tokens,
    WrongCheckCode,
)
from whispr.services.auth.service.announcements import Announcer
from whispr.services.auth.service.audit import AuditTrail
from whispr.services.auth.service.credentials import Credentials
from whispr.services.auth.service.joining import Joining
from whispr.services.auth.service.limits import Limits
from whispr.services.auth.service.prekeys import check_device
from whispr.services.auth.service.second_factor import SecondFactor
from whispr.services.auth.service.sessions import Sessions
from whispr.services.auth.service.vault import open_under, seal_under
from whispr.services.auth.settings import AuthSettings

MAX_WRONG_CONFIRMS = 3

_CODE_CONTEXT = b"whispr-device-link-v1"
_FINISH_CONTEXT = b"whispr-device-link-finish-v1"
_TOKEN_BYTES = 32


class Links:
    """The steps of a link. Each can be repeated with the same outcome, and gives the next one its time."""

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
        self._step = timedelta(seconds=settings.link_seconds)
        self._confirm_step = timedelta(seconds=settings.link_confirm_seconds)

    # --- on a device one has ---

    async def begin(
        self, caller: Caller, password: str, codes: Codes, idempotency_key: str | None = None
    ) -> NewLink:
        """A new link; it ends an older one of the calling device that is not finished.

        Repeated with the same `idempotency_key` and codes it answers the same, as long as nobody has claimed it. Raises
        `WrongPassword`, `TotpRequired`, `BadTotpCode`, `TooManyDevices`, `RateLimited`, `Busy`, `FeatureOff`.
        """
        self._ensure_on()
        await self._limits.link(caller.user_id)
        account = await self._credentials.prove_owner(caller, password)
        request, now = _request_digest(caller, codes, idempotency_key), self._clock.now()
        begun: NewLink | None = None
        async with self._db.transaction() as tx:
            await self._credentials.lock_proven(tx, account)
            if request is not None and idempotency_key is not None:
                made = await store.links.waiting_of_request(tx, account.id, request, now)
                if made is not None:
                    return _again(*made, idempotency_key, now)
            proof = await self._second_factor.check(tx, account.id, codes)
            if proof.refused is None:
                await self._joining.check_room(tx, account.id)
                begun = await self._add(tx, caller, request, idempotency_key, now)
                await self._audit.record(
                    tx,
                    "device_link_begun",
                    account.id,
                    caller.device_id,
                    link_id=str(begun.id),
                    **proof.details,
                )
        if proof.refused is not None:
            raise proof.refused
        assert begun is not None
        return begun

    async def _add(
        self,
        tx: Connection,
        caller: Caller,
        request: bytes | None,
        idempotency_key: str | None,
        now: datetime,
    ) -> NewLink:
        link_id, token = uuid7(), secrets.token_urlsafe(_TOKEN_BYTES)
        sealed = None
        if idempotency_key is not None:
            sealed = seal_under(idempotency_key.encode(), token.encode(), _sealing(link_id))
        await store.links.replace_open(tx, caller.user_id, caller.device_id, now)
        await store.links.insert(
            tx,
            link_id,
            caller.user_id,
            caller.device_id,
            caller.session_id,
            _digest(token),
            request,
            sealed,
            now,
            now + self._step,
        )
        return NewLink(link_id, token, int(self._step.total_seconds()))

    async def get(self, caller: Caller, link_id: UUID) -> tuple[Link, LinkStatus]:
        """A link that the calling device began, and how far it is. Raises `LinkNotFound`."""
        async with self._db.connection() as connection:
            link = _begun_by(caller, await store.links.by_id(connection, link_id))
        return link, link.status(self._clock.now())

    async def confirm(self, caller: Caller, link_id: UUID, code: str) -> None:
        """Let the device in that shows `code`. The third wrong code ends the link.

        Raises `LinkNotFound`, `LinkNotClaimed`, `WrongCheckCode`, `LinkExpired`, `LinkRefused`, `LinkUsed`.
        """
        now = self._clock.now()
        async with self._db.transaction() as tx:
            link = _begun_by(caller, await store.links.lock(tx, link_id))
            status = link.status(now)
            if status == "waiting":
                raise LinkNotClaimed
            _check_open(status)
            left = await self._count_confirm(tx, link, status, code, caller)
            if left is None and status == "claimed":
                await store.links.confirm(tx, link.id, now + self._step)
                await self._audit.record(
                    tx, "device_link_confirmed", caller.user_id, caller.device_id, link_id=str(link.id)
                )
        if left is not None:
            raise WrongCheckCode(attempts_left=left)

    async def refuse(self, caller: Caller, link_id: UUID) -> None:
        """End a link of the caller's account; again changes nothing. Raises `LinkNotFound`, `LinkUsed`."""
        now = self._clock.now()
        async with self._db.transaction() as tx:
            link = await store.links.lock(tx, link_id)
            if link is None or link.account_id != caller.user_id:
                raise LinkNotFound
            if link.stored_status == "finished":
                raise LinkUsed
            if link.status(now) not in ("refused", "expired"):
                await self._refuse(tx, link, caller, "by_owner")

    # --- on the new device ---

    async def claim(self, token: str, device: NewDevice, origin: Origin) -> ClaimedLink:
        """Bring the new device and its keys. The same claim again answers the same.

        Raises `BadSignature`, `InvalidPrekey`, `LinkNotFound`, `LinkUsed` for the second device that tries,
        `LinkExpired`, `LinkRefused`, `FeatureOff`, `RateLimited`.
        """
        self._ensure_on()
        await self._limits.link_from(origin)
        check_device(device)
        now = self._clock.now()
        async with self._db.transaction() as tx:
            link = await store.links.lock_by_token(tx, _digest(token))
            if link is None:
                raise LinkNotFound
            status = link.status(now)
            if status == "finished":
                raise LinkUsed
            _check_open(status)
            await self._check_begun(tx, link)
            if status != "waiting" and link.device != device:
                raise LinkUsed
            code = check_code(token, link.id, device.identity_key, device.signing_key)
            expires_at = link.expires_at
            if status == "waiting":
                expires_at = now + self._confirm_step
                await store.links.claim(tx, link.id, device, code, expires_at)
                await self._audit.record(
                    tx, "device_link_claimed", link.account_id, link.by_device_id, link_id=str(link.id)
                )
        if status == "waiting":
            await self._announcer.link_claimed(link, device)
        return ClaimedLink(link.id, code, int((expires_at - now).total_seconds()))

    async def finish(self, token: str, signature: bytes, origin: Origin) -> Tokens | LinkStatus:
        """The new device's session once the link is confirmed; before that, how far it is.

        `signature` is by the claimed signing key over `finish_message(token)`. Repeated, it gives the same session
        with fresh tokens. Raises `BadSignature`, `LinkNotFound`, `LinkExpired`, `LinkRefused`, `LinkUsed`,
        `TooManyDevices`, `RateLimited`.
        """
        await self._limits.link_from(origin)
        digest, now = _digest(token), self._clock.now()
        async with self._db.connection() as connection:
            account_id = await store.links.account_of(connection, digest)
        if account_id is None:
            raise LinkNotFound
        epoch: int | None = None
        async with self._db.transaction() as tx:
            # The account first, as everything does that changes its devices.
            account = await store.accounts.lock(tx, account_id)
            link = await store.links.lock_by_token(tx, digest)
            if account is None or account.status != "active" or link is None:
                raise LinkNotFound
            status = link.status(now)
            if status == "waiting":
                return status
            if status == "finished":
                family, refresh_token = await self._again(tx, link, token, signature)
            else:
                _check_open(status)
                assert link.device is not None
                _check_signature(link.device.signing_key, token, signature)
                if status == "claimed":
                    return status
                await self._check_begun(tx, link)
                family, refresh_token, epoch = await self._let_in(tx, link, link.device)
            roles = await store.accounts.roles(tx, account_id)
        if epoch is not None:
            await self._announcer.devices_changed(account_id, epoch)
        return await self._sessions.tokens(family, refresh_token, roles)

    async def _let_in(self, tx: Connection, link: Link, device: NewDevice) -> tuple[Family, str, int]:
        await self._joining.check_room(tx, link.account_id)
        joined = await self._joining.join(tx, link.account_id, device)
        family = joined.family
        await store.links.finish(
            tx, link.id, family.device_id, family.session_id, self._clock.now() + self._step
        )
        await self._audit.record(
            tx,
            "device_added",
            link.account_id,
            family.device_id,
            link_id=str(link.id),
            by_device=str(link.by_device_id),
        )
        return family, joined.refresh_token, joined.epoch

    async def _again(self, tx: Connection, link: Link, token: str, signature: bytes) -> tuple[Family, str]:
        assert link.device_id is not None
        assert link.session_id is not None
        device = await store.devices.by_id(tx, link.device_id)
        family = await store.sessions.lock_family(tx, link.session_id)
        if self._clock.now() >= link.expires_at or device is None or family is None:
            raise LinkUsed
        _check_signature(device.signing_key, token, signature)
        if family.revoked_at is not None:
            raise LinkUsed
        return family, await self._sessions.new_token(tx, family)

    async def _count_confirm(
        self, tx: Connection, link: Link, status: LinkStatus, code: str, caller: Caller
    ) -> int | None:
        """How many attempts are left after a wrong code; None if it is right."""
        assert link.check_code is not None
        if hmac.compare_digest(link.check_code.encode(), code.encode()):
            return None
        if status == "finished":
            raise LinkUsed
        left = max(0, MAX_WRONG_CONFIRMS - 1 - link.wrong_confirms)
        await store.links.count_wrong_confirm(tx, link.id)
        if not left:
            await self._refuse(tx, link, caller, "wrong_check_code")
        return left

    async def _refuse(self, tx: Connection, link: Link, caller: Caller, reason: str) -> None:
        await store.links.refuse(tx, link.id, self._clock.now())
        await self._audit.record(
            tx,
            "device_link_refused",
            caller.user_id,
            caller.device_id,
            link_id=str(link.id),
            reason=reason,
        )

    async def _check_begun(self, tx: Connection, link: Link) -> None:
        # A link must not survive the session that began it: removing a stolen device or changing the password ends it.
        if not await store.sessions.is_live(tx, link.by_session_id, self._clock.now()):
            raise LinkRefused


def check_code(token: str, link_id: UUID, identity_key: bytes, signing_key: bytes) -> str:
    """Six digits both devices show: HMAC-SHA-256 under the token over context ‖ link id ‖ the new device's keys.

    The first 8 bytes as a big-endian number, modulo a million. Keys that were swapped on the way show another code.
    """
    message = _CODE_CONTEXT + link_id.bytes + identity_key + signing_key
    digest = hmac.digest(token.encode(), message, "sha256")
    return f"{int.from_bytes(digest[:8], 'big') % 1_000_000:06}"


def finish_message(token: str) -> bytes:
    """What the new device signs to fetch its session."""
    return _FINISH_CONTEXT + token.encode()


def _request_digest(caller: Caller, codes: Codes, idempotency_key: str | None) -> bytes | None:
    # The codes too: a repeat is answered without spending one, so it must know the one that was spent.
    if idempotency_key is None:
        return None
    return hashlib.sha256(msgspec.json.encode([caller.session_id, codes, idempotency_key])).digest()


def _again(
    link_id: UUID, sealed: bytes, expires_at: datetime, idempotency_key: str, now: datetime
) -> NewLink:
    token = open_under(idempotency_key.encode(), sealed, _sealing(link_id)).decode()
    return NewLink(link_id, token, int((expires_at - now).total_seconds()))


def _sealing(link_id: UUID) -> bytes:
    # With the link's id: a client that uses a key for two links must not seal two tokens alike.
    return b"whispr link token|" + link_id.bytes


def _begun_by(caller: Caller, link: Link | None) -> Link:
    if link is None or (link.account_id, link.by_device_id) != (caller.user_id, caller.device_id):
        raise LinkNotFound
    return link


def _check_open(status: LinkStatus) -> None:
    if status == "expired":
        raise LinkExpired
    if status == "refused":
        raise LinkRefused


def _check_signature(signing_key: bytes, token: str, signature: bytes) -> None:
    try:
        VerifyKey(signing_key).verify(finish_message(token), signature)
    except (BadSignatureError, ValueError):
        raise BadSignature from None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
