"""The device's own prekeys: private halves by key id in the local store.

Key ids only grow and a one-time key is deleted with the first message that used it, so no key ever serves twice.
The signed prekey and the post-quantum key of last resort are replaced weekly; their predecessors stay for 30 days, for
messages that were on their way. Both kinds of post-quantum keys count their ids together: an id says which key.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from whispr.client.encoding import encode_base64
from whispr.client.store import Store

from . import kem
from .identity import DeviceIdentity

STOCK: Final = 100
# Each is 1.7 KiB of upload. When they are used up the key of last resort serves.
PQ_STOCK: Final = 50
LOW: Final = 20
ROTATE_AFTER: Final = 7 * 86400.0
KEEP_OLD: Final = 30 * 86400.0

_SIGNED = "signed_prekeys"
_ONE_TIME = "one_time_prekeys"
_LAST_RESORT = "pq_last_resort_prekeys"
_PQ_ONE_TIME = "pq_one_time_prekeys"
_PQ = "pq_prekeys"
_COUNTERS = "prekey_counters"


class SignedPrekey(msgspec.Struct, frozen=True):
    key_id: int
    private_key: bytes
    signature: bytes
    created_at: float

    @property
    def public_key(self) -> bytes:
        return X25519PrivateKey.from_private_bytes(self.private_key).public_key().public_bytes_raw()


class PqPrekey(msgspec.Struct, frozen=True):
    """An ML-KEM-768 key: `seed` is the private half."""

    key_id: int
    seed: bytes
    signature: bytes
    created_at: float

    @property
    def public_key(self) -> bytes:
        return kem.public_key(self.seed)


class _Dated(msgspec.Struct, frozen=True):
    key_id: int
    created_at: float


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
        self._forget_old(_SIGNED, now)
        self._store.save(_SIGNED, _name(prekey.key_id), prekey)
        return prekey

    def last_resort(self) -> PqPrekey:
        """The post-quantum key of last resort in use; made on first use."""
        ids = self._store.keys(_LAST_RESORT)
        if not ids:
            return self.rotate_last_resort()
        found = self._store.load(_LAST_RESORT, ids[-1], PqPrekey)
        assert found is not None
        return found

    def rotate_last_resort(self) -> PqPrekey:
        """Make a new post-quantum key of last resort and forget those out of use for longer than `KEEP_OLD`."""
        self._forget_old(_LAST_RESORT, self._now())
        return self._make_pq(_LAST_RESORT)

    def due(self) -> bool:
        """Whether the signed prekey and the key of last resort should be rotated."""
        return self._now() - self.current().created_at > ROTATE_AFTER

    def signed(self, key_id: int) -> SignedPrekey | None:
        return self._store.load(_SIGNED, _name(key_id), SignedPrekey)

    def one_time(self, key_id: int) -> bytes | None:
        """The private key, or None if there is none or it was used."""
        return self._store.get(_ONE_TIME, _name(key_id))

    def use(self, key_id: int) -> None:
        self._store.delete(_ONE_TIME, _name(key_id))

    def post_quantum(self, key_id: int) -> PqPrekey | None:
        """One-time or of last resort; None if there is none or it was used."""
        for space in (_PQ_ONE_TIME, _LAST_RESORT):
            found = self._store.load(space, _name(key_id), PqPrekey)
            if found is not None:
                return found
        return None

    def use_post_quantum(self, key_id: int) -> None:
        """A one-time key is gone after this; a key of last resort stays."""
        self._store.delete(_PQ_ONE_TIME, _name(key_id))

    def generate(self, count: int) -> list[dict[str, Any]]:
        """Make `count` one-time keys; returns their public halves as contracts write them."""
        made = []
        for _ in range(count):
            key = X25519PrivateKey.generate()
            key_id = self._next_id(_ONE_TIME)
            self._store.put(_ONE_TIME, _name(key_id), key.private_bytes_raw())
            made.append({"key_id": key_id, "public_key": encode_base64(key.public_key().public_bytes_raw())})
        return made

    def generate_post_quantum(self, count: int) -> list[dict[str, Any]]:
        """Make `count` one-time post-quantum keys; returns their public halves as contracts write them."""
        return [published(self._make_pq(_PQ_ONE_TIME)) for _ in range(count)]

    def _make_pq(self, space: str) -> PqPrekey:
        seed = kem.generate()
        signature = self._identity.sign(kem.public_key(seed))
        prekey = PqPrekey(self._next_id(_PQ), seed, signature, self._now())
        self._store.save(space, _name(prekey.key_id), prekey)
        return prekey

    def _forget_old(self, space: str, now: float) -> None:
        kept = [self._store.load(space, name, _Dated) for name in self._store.keys(space)]
        for replaced, successor in itertools.pairwise(kept):
            if replaced and successor and now - successor.created_at > KEEP_OLD:
                self._store.delete(space, _name(replaced.key_id))

    def _next_id(self, kind: str) -> int:
        value = 1 + (self._store.load(_COUNTERS, kind, int) or 0)
        self._store.save(_COUNTERS, kind, value)
        return value


def published(prekey: SignedPrekey | PqPrekey) -> dict[str, Any]:
    """The public half as contracts write it."""
    return {
        "key_id": prekey.key_id,
        "public_key": encode_base64(prekey.public_key),
        "signature": encode_base64(prekey.signature),
    }


def _name(key_id: int) -> str:
    # Padded, so that the store's ascending order is the numbers' order.
    return f"{key_id:010}"
