"""A device's long-term keys.

Contracts name two public keys a device: `identity_key` (X25519, for key agreement) and `signing_key` (Ed25519).
This library makes both from one Ed25519 seed; the X25519 key is the birational image of the Ed25519 key, as the
X3DH library does it. So a fingerprint of either covers both. Other clients may use two unrelated keys: nothing
here expects a peer's keys to be related.
"""

from __future__ import annotations

import hashlib
import secrets

import msgspec
import xeddsa
from nacl.signing import SigningKey

from whispr.client.encoding import encode_base64


class DeviceIdentity(msgspec.Struct, frozen=True):
    """The secret half: `seed` (32 bytes) and the registration id (1..16380) that tells installations apart."""

    seed: bytes
    registration_id: int

    @classmethod
    def generate(cls) -> DeviceIdentity:
        return cls(secrets.token_bytes(32), 1 + secrets.randbelow(16380))

    @property
    def signing_key(self) -> bytes:
        return xeddsa.seed_to_ed25519_pub(self.seed)

    @property
    def private_key(self) -> bytes:
        """The X25519 private key."""
        return xeddsa.seed_to_priv(self.seed)

    @property
    def identity_key(self) -> bytes:
        return xeddsa.priv_to_curve25519_pub(self.private_key)

    def published(self) -> dict[str, str]:
        """The public halves as contracts write them."""
        return {
            "identity_key": encode_base64(self.identity_key),
            "signing_key": encode_base64(self.signing_key),
        }

    def sign(self, message: bytes) -> bytes:
        """64 bytes, Ed25519."""
        return SigningKey(self.seed).sign(message).signature


def fingerprint(identity_key: bytes, signing_key: bytes) -> str:
    """Sixty digits in twelve groups, for people to compare by eye or voice."""
    digest = hashlib.sha512(b"whispr-fingerprint-v1" + identity_key + signing_key).digest()
    groups = (int.from_bytes(digest[i : i + 5], "big") % 100_000 for i in range(0, 60, 5))
    return " ".join(f"{group:05}" for group in groups)
