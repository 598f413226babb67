"""What is known of other devices: whose they are, their keys as first seen, and how those changed.

Keys are pinned when first seen. When the server later names other keys for the same device (it was reinstalled, or
someone swapped its keys), the change is recorded, reported to the application and the sessions with the old
keys are retired; old keys still verify what they signed before.
"""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

import msgspec

from whispr.client.store import Store

from .agreement import PrekeyBundle
from .identity import fingerprint

_DEVICES = "devices"
_USERS = "users"


class PinnedKeys(msgspec.Struct, frozen=True):
    registration_id: int
    identity_key: bytes
    signing_key: bytes


class KnownDevice(msgspec.Struct, frozen=True):
    """`keys[0]` are the present keys, the rest earlier ones. `bundle` is handed out but not yet used.

    `confirmed` is False while the keys were only claimed by the device itself in a message.
    """

    user_id: UUID
    device_id: UUID
    keys: list[PinnedKeys]
    bundle: PrekeyBundle | None = None
    confirmed: bool = True

    @property
    def current(self) -> PinnedKeys:
        return self.keys[0]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.current.identity_key, self.current.signing_key)


class IdentityChanged(msgspec.Struct, frozen=True):
    """A known device has other keys than before. People should compare fingerprints."""

    user_id: UUID
    device_id: UUID
    old_fingerprint: str
    new_fingerprint: str


class Directory:
    """Changes need an open store transaction."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def device(self, device_id: UUID) -> KnownDevice | None:
        return self._store.load(_DEVICES, str(device_id), KnownDevice)

    def devices_of(self, user_id: UUID) -> list[KnownDevice] | None:
        """The person's active devices as last heard, or None if the server was never asked."""
        ids = self._store.load(_USERS, str(user_id), list[UUID])
        if ids is None:
            return None
        return [device for device in map(self.device, ids) if device is not None]

    def learn(self, user_id: UUID, bundles: dict[UUID, PrekeyBundle]) -> list[IdentityChanged]:
        """Take in bundles the server handed out for some devices of a person."""
        changes = []
        for device_id, bundle in bundles.items():
            keys = PinnedKeys(bundle.registration_id, bundle.identity_key, bundle.signing_key)
            change = self._pin(user_id, device_id, keys, bundle, confirmed=True)
            if change is not None:
                changes.append(change)
        self._list(user_id, add=bundles)
        return changes

    def claim(self, user_id: UUID, device_id: UUID, keys: PinnedKeys) -> None:
        """Pin the keys a device named itself, when the server no longer knows the device."""
        self._pin(user_id, device_id, keys, None, confirmed=False)

    def set_devices(self, user_id: UUID, device_ids: Iterable[UUID]) -> None:
        """Replace the list of a person's active devices."""
        self._store.save(_USERS, str(user_id), sorted(device_ids))

    def remove(self, device_ids: Iterable[UUID]) -> None:
        """The devices are no longer active. Their keys stay known, for messages from before."""
        gone = set(device_ids)
        for name in self._store.keys(_USERS):
            ids = self._store.load(_USERS, name, list[UUID]) or []
            if gone.intersection(ids):
                self._store.save(_USERS, name, [device_id for device_id in ids if device_id not in gone])

    def take_bundle(self, device_id: UUID) -> PrekeyBundle | None:
        """The unused bundle of a device; it is forgotten, since its one-time key may serve only once."""
        device = self.device(device_id)
        if device is None or device.bundle is None:
            return None
        self._save(msgspec.structs.replace(device, bundle=None))
        return device.bundle

    def _pin(
        self,
        user_id: UUID,
        device_id: UUID,
        keys: PinnedKeys,
        bundle: PrekeyBundle | None,
        *,
        confirmed: bool,
    ) -> IdentityChanged | None:
        known = self.device(device_id)
        if known is None or known.current == keys:
            history = known.keys if known else [keys]
            self._save(KnownDevice(user_id, device_id, history, bundle, confirmed))
            return None
        changed = KnownDevice(user_id, device_id, [keys, *known.keys], bundle, confirmed)
        self._save(changed)
        return IdentityChanged(user_id, device_id, known.fingerprint, changed.fingerprint)

    def _list(self, user_id: UUID, add: Iterable[UUID]) -> None:
        ids = set(self._store.load(_USERS, str(user_id), list[UUID]) or [])
        self.set_devices(user_id, ids | set(add))

    def _save(self, device: KnownDevice) -> None:
        self._store.save(_DEVICES, str(device.device_id), device)
