"""The device's own prekeys: private halves by key id in the local store.

Key ids only grow and a one-time key is deleted with the first message that used it, so no key ever serves twice.
A signed prekey is replaced weekly; its predecessors stay for 30 days, for messages that were on their way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from whispr.client.encoding import encode_base64
from whispr.client.store import Store

from .identity import DeviceIdentity

STOCK: Final = 100
LOW: Final = 20
ROTATE_AFTER: Final = 7 * 86400.0
KEEP_OLD: Final = 30 * 86400.0

_SIGNED = "signed_prekeys"
_ONE_TIME = "one_time_prekeys"
_COUNTERS = "prekey_counters"


class SignedPrekey(msgspec.Struct, frozen=True):
    key_id: int
    private_key: bytes
    signature: bytes
    created_at: float

    @property
    def public_key(self) -> bytes:
        return X25519PrivateKey.from_private_bytes(self.private_key).public_key().public_bytes_raw()


class PrekeyStock:
    """Writes need an open store transaction. `now` gives epoch seconds."""

    def __init__(self, store: Store, identity: DeviceIdentity, now: Callable[[], float]) -> None:
        self._store = store
        self._identity = identity
        self._now = now

    def current(self) -> SignedPrekey:
        """The signed prekey in use; made on first use."""
        ids = self._store.keys(_SIGNED)
        if not ids:
            return self.rotate()
        found = self.signed(int(ids[-1]))
        assert found is not None
        return found

    def rotate(self) -> SignedPrekey:
        """Make a new signed prekey and forget those out of use for longer than `KEEP_OLD`."""
        now = self._now()
        key = X25519PrivateKey.generate()
        prekey = SignedPrekey(
            key_id=self._next_id(_SIGNED),
            private_key=key.private_bytes_raw(),
            signature=self._identity.sign(key.public_key().public_bytes_raw()),
            created_at=now,
        )
        old = [self._store.load(_SIGNED, name, SignedPrekey) for name in self._store.keys(_SIGNED)]
        for replaced, successor in itertools.pairwise(old):
            if replaced and successor and now - successor.created_at > KEEP_OLD:
                self._store.delete(_SIGNED, _name(replaced.key_id))
        self._store.save(_SIGNED, _name(prekey.key_id), prekey)
        return prekey

    def due(self) -> bool:
        """Whether the signed prekey should be rotated."""
        return self._now() - self.current().created_at > ROTATE_AFTER

    def signed(self, key_id: int) -> SignedPrekey | None:
        return self._store.load(_SIGNED, _name(key_id), SignedPrekey)

    def one_time(self, key_id: int) -> bytes | None:
        """The private key, or None if there is none or it was used."""
        return self._store.get(_ONE_TIME, _name(key_id))

    def use(self, key_id: int) -> None:
        self._store.delete(_ONE_TIME, _name(key_id))

    def generate(self, count: int) -> list[dict[str, Any]]:
        """Make `count` one-time keys; returns their public halves as contracts write them."""
        made = []
        for _ in range(count):
            key = X25519PrivateKey.generate()
            key_id = self._next_id(_ONE_TIME)
            self._store.put(_ONE_TIME, _name(key_id), key.private_bytes_raw())
            made.append({"key_id": key_id, "public_key": encode_base64(key.public_key().public_bytes_raw())})
        return made

    def _next_id(self, kind: str) -> int:
        value = 1 + (self._store.load(_COUNTERS, kind, int) or 0)
        self._store.save(_COUNTERS, kind, value)
        return value


def published(prekey: SignedPrekey) -> dict[str, Any]:
    """The public half as contracts write it."""
    return {
        "key_id": prekey.key_id,
        "public_key": encode_base64(prekey.public_key),
        "signature": encode_base64(prekey.signature),
    }


def _name(key_id: int) -> str:
    # Padded, so that the store's ascending order is the numbers' order.
    return f"{key_id:010}"
