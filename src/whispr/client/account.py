"""The device's login and long-term keys in the local store, and its stock of prekeys on the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final
from uuid import uuid4

import msgspec

from whispr.client.crypto.identity import DeviceIdentity
from whispr.client.crypto.prekeys import LOW, PQ_STOCK, STOCK, PrekeyStock, published
from whispr.client.failures import ApiError, ClientError
from whispr.client.models import SecondFactor, Session
from whispr.client.rest import RestClient
from whispr.client.store import Store

_SPACE: Final = "account"
# Refusals after which the same key would come with another body.
_OTHER_BODY_NEXT: Final = frozenset({"totp_required", "bad_totp_code"})


class _Entry(msgspec.Struct):
    """A registration or login that may have to be repeated: the same key and form give the same device."""

    door: str
    username: str
    idempotency_key: str
    device: dict[str, Any]


class _Upload(msgspec.Struct):
    """Public halves on their way to the server."""

    signed: dict[str, Any]
    one_time: list[dict[str, Any]]
    pq_last_resort: dict[str, Any] | None = None
    pq_one_time: list[dict[str, Any]] = []


class AlreadyRegistered(ClientError):
    """This store belongs to a device already."""


class Account:
    """`now` gives epoch seconds."""

    def __init__(self, store: Store, rest: RestClient, now: Callable[[], float]) -> None:
        self._store = store
        self._rest = rest
        self._now = now
        # Two uploads at once would each keep its own keys and forget the other's.
        self._tending = asyncio.Lock()

    @property
    def session(self) -> Session | None:
        return load_session(self._store)

    @property
    def identity(self) -> DeviceIdentity:
        """Made on first use."""
        identity = self._store.load(_SPACE, "identity", DeviceIdentity)
        if identity is None:
            identity = DeviceIdentity.generate()
            with self._store.transaction():
                self._store.save(_SPACE, "identity", identity)
        return identity

    async def enter(
        self,
        door: str,
        username: str,
        password: str,
        name: str,
        platform: str,
        second_factor: SecondFactor | None = None,
    ) -> Session:
        """Register (`door` "register") or log in ("login") with this store as a new device.

        Repeated after a crash or a lost answer, it gives the same device. Raises ApiError (`totp_required` where a
        second factor is missing), Unreachable, AlreadyRegistered.
        """
        device = self.offer(door, username, name, platform)
        key = self._key()
        if door == "register":
            session = await self._rest.register(username, password, device, idempotency_key=key)
        else:
            try:
                session = await self._rest.login(
                    username, password, device=device, second_factor=second_factor, idempotency_key=key
                )
            except ApiError as error:
                if error.code in _OTHER_BODY_NEXT:
                    self._renew_key()
                raise
        self.entered()
        return session

    def offer(self, door: str, who: str, name: str, platform: str) -> dict[str, Any]:
        """DEVICE for a registration, login or link, the same for each attempt. Raises AlreadyRegistered."""
        if self.session is not None:
            raise AlreadyRegistered("this store is logged in already")
        entry = self._store.load(_SPACE, "entry", _Entry)
        if entry is None or (entry.door, entry.username) != (door, who):
            entry = self._prepare(door, who, name, platform)
        return entry.device

    def entered(self) -> None:
        """The server has the device."""
        with self._store.transaction():
            self._store.delete(_SPACE, "entry")

    def _key(self) -> str | None:
        entry = self._store.load(_SPACE, "entry", _Entry)
        return None if entry is None else entry.idempotency_key

    def _renew_key(self) -> None:
        entry = self._store.load(_SPACE, "entry", _Entry)
        if entry is not None:
            entry.idempotency_key = str(uuid4())
            with self._store.transaction():
                self._store.save(_SPACE, "entry", entry)

    async def tend_prekeys(self, prekeys: PrekeyStock) -> None:
        """Finish an interrupted upload, rotate the lasting prekeys when due, and fill up what is low."""
        async with self._tending:
            upload = self._store.load(_SPACE, "upload", _Upload)
            if upload is None:
                upload = self._next_upload(prekeys, await self._rest.key_counts())
            if upload is None:
                return
            await self._rest.upload_keys(
                upload.signed, upload.one_time, upload.pq_last_resort, upload.pq_one_time
            )
            with self._store.transaction():
                self._store.delete(_SPACE, "upload")

    def _next_upload(self, prekeys: PrekeyStock, counts: Mapping[str, Any]) -> _Upload | None:
        ec = STOCK if counts.get("one_time_prekeys", 0) < LOW else 0
        pq = PQ_STOCK if counts.get("pq_one_time_prekeys", 0) < LOW else 0
        if not (ec or pq or prekeys.due() or counts.get("pq_last_resort_prekey_id") is None):
            return None
        with self._store.transaction():
            if prekeys.due():
                prekeys.rotate()
                prekeys.rotate_last_resort()
            upload = _Upload(
                published(prekeys.current()),
                prekeys.generate(ec),
                published(prekeys.last_resort()),
                prekeys.generate_post_quantum(pq),
            )
            # Kept before it is sent: what the server may hand out, this device must be able to answer.
            self._store.save(_SPACE, "upload", upload)
        return upload

    def _prepare(self, door: str, username: str, name: str, platform: str) -> _Entry:
        identity = self.identity
        prekeys = PrekeyStock(self._store, identity, self._now)
        with self._store.transaction():
            entry = _Entry(
                door,
                username,
                str(uuid4()),
                {
                    "name": name,
                    "platform": platform,
                    "registration_id": identity.registration_id,
                    **identity.published(),
                    "signed_prekey": published(prekeys.current()),
                    "one_time_prekeys": prekeys.generate(STOCK),
                    "pq_last_resort_prekey": published(prekeys.last_resort()),
                },
            )
            self._store.save(_SPACE, "entry", entry)
        return entry


def load_session(store: Store) -> Session | None:
    return store.load(_SPACE, "session", Session)


def keep_session(store: Store, session: Session) -> None:
    with store.transaction():
        store.save(_SPACE, "session", session)
