"""Keeps the directory of other devices in step with the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from uuid import UUID

import msgspec

from whispr.client.crypto.agreement import PrekeyBundle
from whispr.client.crypto.directory import KnownDevice
from whispr.client.crypto.engine import BundleNeeded, Engine, UnknownSender
from whispr.client.events import Notice
from whispr.client.failures import ApiError, Undecryptable
from whispr.client.models import DeviceKeys
from whispr.client.rest import RestClient
from whispr.client.store import Store


class Devices:
    """Asks the server for keys only when they are needed: each answer costs the other side a one-time key."""

    def __init__(
        self, store: Store, engine: Engine, rest: RestClient, notify: Callable[[Notice], None]
    ) -> None:
        self._store = store
        self._engine = engine
        self._rest = rest
        self._notify = notify

    async def of(self, members: Iterable[UUID]) -> list[KnownDevice]:
        """All devices of the members but this one."""
        devices: list[KnownDevice] = []
        for user_id in sorted(members):
            known = self._engine.directory.devices_of(user_id)
            if known is None:
                await self._ask_for_user(user_id)
                known = self._engine.directory.devices_of(user_id) or []
            devices += [device for device in known if device.device_id != self._engine.device_id]
        return devices

    async def provide(self, needed: BundleNeeded) -> None:
        """Get the bundles that sealing lacked."""
        for device in needed.devices:
            await self._ask_for_device(device.user_id, device.device_id)

    async def reconcile(self, members: Iterable[UUID], refusal: Mapping[str, Any]) -> None:
        """Follow the server's `devices_mismatch {missing, owners, extra, stale}`."""
        known_members = set(members)
        extra = {UUID(device_id) for device_id in refusal.get("extra", ())}
        with self._store.transaction():
            self._engine.directory.remove(extra)
        for device_id in map(UUID, refusal.get("stale", ())):
            known = self._engine.directory.device(device_id)
            if known is not None:
                await self._ask_for_device(known.user_id, device_id)
        owners = refusal.get("owners", {})
        for device_id in refusal.get("missing", ()):
            if device_id not in owners:
                continue
            owner = UUID(owners[device_id])
            # Whoever is no member gets nothing encrypted, whatever the server says.
            if owner in known_members:
                await self._ask_for_device(owner, UUID(device_id))

    async def identify(self, unknown: UnknownSender) -> None:
        """Learn the keys of a device that sent something. Raises Undecryptable when they cannot be what it used."""
        found = await self._ask_for_device(unknown.user_id, unknown.device_id)
        if found:
            return
        if unknown.claimed is None or self._engine.directory.device(unknown.device_id) is not None:
            raise Undecryptable("unknown_keys")
        with self._store.transaction():
            # The server no longer has the device. What it sent is still read, marked as unverified.
            self._engine.directory.claim(unknown.user_id, unknown.device_id, unknown.claimed)

    async def _ask_for_user(self, user_id: UUID) -> None:
        try:
            found = (await self._rest.user_keys(user_id)).devices
        except ApiError as error:
            if error.status != 404:
                raise
            found = []
        self._learn(user_id, found)

    async def _ask_for_device(self, user_id: UUID, device_id: UUID) -> bool:
        found = await self._rest.device_keys(user_id, device_id)
        if found is None:
            return False
        self._learn(user_id, [found])
        return True

    def _learn(self, user_id: UUID, found: list[DeviceKeys]) -> None:
        bundles = {keys.device_id: bundle_of(keys) for keys in found}
        before = self._engine.directory.devices_of(user_id)
        with self._store.transaction():
            changes = self._engine.learn(user_id, bundles)
        for change in changes:
            self._notify(Notice("identity_changed", msgspec.to_builtins(change)))
        if before is None:
            return
        for device_id in bundles.keys() - {device.device_id for device in before}:
            # Whoever can add a device to an account reads along: people should be able to notice.
            self._notify(Notice("device_added", {"user_id": str(user_id), "device_id": str(device_id)}))


def bundle_of(keys: DeviceKeys) -> PrekeyBundle:
    """The server's form of a bundle as cryptography takes it. Its signature is checked when it is used."""
    one_time, pq = keys.one_time_prekey, keys.pq_prekey
    return PrekeyBundle(
        registration_id=keys.registration_id,
        identity_key=keys.identity_key,
        signing_key=keys.signing_key,
        signed_prekey_id=keys.signed_prekey.key_id,
        signed_prekey=keys.signed_prekey.public_key,
        signed_prekey_signature=keys.signed_prekey.signature or b"",
        one_time_prekey_id=one_time.key_id if one_time else None,
        one_time_prekey=one_time.public_key if one_time else None,
        pq_prekey_id=pq.key_id if pq else None,
        pq_prekey=pq.public_key if pq else None,
        pq_prekey_signature=pq.signature if pq else None,
    )
