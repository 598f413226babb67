"""Prekeys: uploaded by devices, checked, and handed out so that no one-time key is given twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.kit.errors import Invalid
from whispr.kit.identity import Caller
from whispr.services.auth import store
from whispr.services.auth.models import (
    BadSignature,
    Bundle,
    Device,
    DeviceNotFound,
    InvalidPrekey,
    KeyIdConflict,
    KeysMismatch,
    NewDevice,
    OneTimeKey,
    OneTimeKind,
    PrekeyCounts,
    PrekeyUpload,
    SignedKey,
    TooManyPrekeys,
    UserNotFound,
)
from whispr.services.auth.service.announcements import Announcer
from whispr.services.auth.service.limits import Limits
from whispr.services.auth.settings import AuthSettings


class Prekeys:
    """The key server: what a peer needs to write to a device that is asleep."""

    def __init__(
        self, db: Database, clock: Clock, announcer: Announcer, limits: Limits, settings: AuthSettings
    ) -> None:
        self._db = db
        self._clock = clock
        self._announcer = announcer
        self._limits = limits
        self._settings = settings

    async def upload(self, caller: Caller, upload: PrekeyUpload) -> PrekeyCounts:
        """Replace the calling device's lasting keys and add one-time keys; what the server holds then.

        Repeating an upload changes nothing, and never brings back a key that was handed out since. Raises
        `BadSignature`, `InvalidPrekey`, `KeyIdConflict`, `TooManyPrekeys`, `DeviceNotFound`, `RateLimited`.
        """
        await self._limits.upload(caller.device_id)
        pq_keys = _one_time(upload.pq_one_time_prekeys)
        _check_distinct(upload.one_time_prekeys)
        _check_distinct(pq_keys)
        async with self._db.transaction() as tx:
            device = await store.devices.lock_active(tx, caller.user_id, caller.device_id)
            if device is None:
                raise DeviceNotFound
            _check_signatures(
                device.signing_key,
                upload.signed_prekey,
                upload.pq_last_resort_prekey,
                *upload.pq_one_time_prekeys,
            )
            _check_kem(upload.pq_last_resort_prekey, *upload.pq_one_time_prekeys)
            now = self._clock.now()
            if upload.signed_prekey is not None:
                await store.prekeys.put_lasting(tx, device.id, "signed", upload.signed_prekey, now)
            if upload.pq_last_resort_prekey is not None:
                await store.prekeys.put_lasting(
                    tx, device.id, "pq_last_resort", upload.pq_last_resort_prekey, now
                )
            await self._add(tx, device.id, "ec", upload.one_time_prekeys)
            await self._add(tx, device.id, "pq", pq_keys)
            return await self._counts(tx, device.id)

    async def counts(self, caller: Caller) -> PrekeyCounts:
        """What the server holds of the calling device. Raises `DeviceNotFound`."""
        async with self._db.connection() as connection:
            return await self._counts(connection, caller.device_id)

    async def check(self, caller: Caller, digest: bytes) -> None:
        """Do the keys handed out equal the device's own? Raises `KeysMismatch` if `digest` is not `keys_digest`."""
        async with self._db.connection() as connection:
            device = await store.devices.by_id(connection, caller.device_id)
            lasting = await store.prekeys.lasting(connection, [caller.device_id])
        signed = lasting.get((caller.device_id, "signed"))
        if device is None or signed is None:
            raise DeviceNotFound
        last_resort = lasting.get((caller.device_id, "pq_last_resort"))
        if keys_digest(device.identity_key, signed, last_resort) != digest:
            raise KeysMismatch

    async def claim(self, caller: Caller, user_id: UUID, device_id: UUID | None = None) -> list[Bundle]:
        """What opens sessions with the active devices of `user_id`, or with one of them.

        Takes one one-time key of each kind from each device; None when there is none left. The calling device is left
        out, or, asked for by its id, given without a one-time key. Raises `UserNotFound`, `DeviceNotFound`,
        `RateLimited`.
        """
        await self._limits.claim(caller.user_id, user_id)
        async with self._db.transaction() as tx:
            lists = await store.devices.lists(tx, [user_id])
            if not lists:
                raise UserNotFound
            devices = [device for device in lists[0].devices if device_id in (None, device.id)]
            if device_id is not None and not devices:
                raise DeviceNotFound
            others = [device.id for device in devices if device.id != caller.device_id]
            now = self._clock.now()
            ec = await store.prekeys.claim_one_time(tx, others, "ec", now)
            pq = await store.prekeys.claim_one_time(tx, others, "pq", now)
            lasting = await store.prekeys.lasting(tx, [device.id for device in devices])
        await self._announce_low(others, "ec")
        # A device without any post-quantum key does not use them and need not be asked for more.
        await self._announce_low(
            [item for item in others if item in pq or (item, "pq_last_resort") in lasting], "pq"
        )
        bundles = []
        for device in devices:
            signed = lasting.get((device.id, "signed"))
            if signed is None or (device.id == caller.device_id and device_id is None):
                continue
            last_resort = lasting.get((device.id, "pq_last_resort"))
            bundles.append(
                _bundle(device, signed, ec.get(device.id), pq.get(device.id) or _repeatable(last_resort))
            )
        return bundles

    async def _add(
        self, tx: Connection, device_id: UUID, kind: OneTimeKind, keys: Sequence[OneTimeKey]
    ) -> None:
        if not keys:
            return
        digests = [key_digest(key) for key in keys]
        conflicting = await store.prekeys.conflicts(tx, device_id, kind, keys, digests)
        if conflicting:
            raise KeyIdConflict(key_ids=conflicting)
        await store.prekeys.add_one_time(tx, device_id, kind, keys, digests)
        await store.prekeys.drop_spent(tx, device_id)
        stored = (await store.prekeys.count(tx, device_id))[kind]
        if stored > self._settings.max_one_time_prekeys:
            raise TooManyPrekeys(limit=self._settings.max_one_time_prekeys)
        if stored >= self._settings.low_prekeys:
            await store.prekeys.unmark_low(tx, device_id, kind)

    async def _counts(self, connection: Connection, device_id: UUID) -> PrekeyCounts:
        lasting = await store.prekeys.lasting(connection, [device_id])
        signed = lasting.get((device_id, "signed"))
        if signed is None:
            raise DeviceNotFound
        last_resort = lasting.get((device_id, "pq_last_resort"))
        stored = await store.prekeys.count(connection, device_id)
        return PrekeyCounts(
            stored["ec"], stored["pq"], signed.key_id, last_resort.key_id if last_resort else None
        )

    async def _announce_low(self, device_ids: Sequence[UUID], kind: OneTimeKind) -> None:
        if not device_ids:
            return
        low = self._settings.low_prekeys
        async with self._db.connection() as connection:
            for device_id in await store.prekeys.unmarked_low(connection, device_ids, kind, low):
                marked = await store.prekeys.mark_low(connection, device_id, kind, low)
                if marked is not None:
                    user_id, remaining = marked
                    await self._announcer.prekeys_low(user_id, device_id, _KEY_TYPES[kind], remaining)


# As the upload's members are named.
_KEY_TYPES: dict[OneTimeKind, str] = {"ec": "one_time_prekeys", "pq": "pq_one_time_prekeys"}


def check_device(device: NewDevice) -> None:
    """Are the device's keys its own and what they say they are? Raises `BadSignature`, `InvalidPrekey`, `Invalid`."""
    pq_keys = (device.pq_last_resort_prekey, *device.pq_one_time_prekeys)
    _check_signatures(device.signing_key, device.signed_prekey, *pq_keys)
    _check_kem(*pq_keys)
    _check_distinct(device.one_time_prekeys)
    _check_distinct(_one_time(device.pq_one_time_prekeys))


async def add_first_prekeys(tx: Connection, device_id: UUID, device: NewDevice, now: datetime) -> None:
    """Store what a new device brings: a device never exists without keys."""
    await store.prekeys.put_lasting(tx, device_id, "signed", device.signed_prekey, now)
    if device.pq_last_resort_prekey is not None:
        await store.prekeys.put_lasting(tx, device_id, "pq_last_resort", device.pq_last_resort_prekey, now)
    stocks: list[tuple[OneTimeKind, Sequence[OneTimeKey]]] = [
        ("ec", device.one_time_prekeys),
        ("pq", _one_time(device.pq_one_time_prekeys)),
    ]
    for kind, keys in stocks:
        if keys:
            await store.prekeys.add_one_time(tx, device_id, kind, keys, [key_digest(key) for key in keys])


def keys_digest(identity_key: bytes, signed: SignedKey, last_resort: SignedKey | None) -> bytes:
    """SHA-256 over identity key ‖ be64 signed id ‖ signed key ‖ be64 last-resort id ‖ last-resort key.

    Without a last-resort key its id counts as 0 and its bytes as none.
    """
    parts = [identity_key, signed.key_id.to_bytes(8, "big"), signed.public_key]
    parts += [last_resort.key_id.to_bytes(8, "big"), last_resort.public_key] if last_resort else [bytes(8)]
    return hashlib.sha256(b"".join(parts)).digest()


def key_digest(key: OneTimeKey) -> bytes:
    """By which a key that was handed out is known for ever."""
    return hashlib.sha256(key.public_key).digest()


def _check_signatures(signing_key: bytes, *keys: SignedKey | None) -> None:
    try:
        verify_key = VerifyKey(signing_key)
        for key in keys:
            if key is not None:
                verify_key.verify(key.public_key, key.signature)
    except (BadSignatureError, ValueError):
        raise BadSignature from None


def _check_kem(*keys: SignedKey | None) -> None:
    # A peer that meets a key it cannot encapsulate to could not write to the device at all.
    try:
        for key in keys:
            if key is not None:
                MLKEM768PublicKey.from_public_bytes(key.public_key)
    except ValueError:
        raise InvalidPrekey from None


def _one_time(keys: Sequence[SignedKey]) -> list[OneTimeKey]:
    return [OneTimeKey(key.key_id, key.public_key, key.signature) for key in keys]


def _check_distinct(keys: Sequence[OneTimeKey]) -> None:
    if len({key.key_id for key in keys}) < len(keys) or len({key.public_key for key in keys}) < len(keys):
        raise Invalid("A one-time prekey appears twice.")


def _repeatable(last_resort: SignedKey | None) -> OneTimeKey | None:
    if last_resort is None:
        return None
    return OneTimeKey(last_resort.key_id, last_resort.public_key, last_resort.signature)


def _bundle(device: Device, signed: SignedKey, ec: OneTimeKey | None, pq: OneTimeKey | None) -> Bundle:
    return Bundle(
        device_id=device.id,
        registration_id=device.registration_id,
        identity_key=device.identity_key,
        signing_key=device.signing_key,
        signed_prekey=signed,
        one_time_prekey=ec,
        pq_prekey=pq,
    )
