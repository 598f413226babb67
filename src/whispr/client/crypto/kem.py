"""ML-KEM-768 (FIPS 203), the post-quantum half of the key agreement: keys as bytes, so that they can be stored."""

from __future__ import annotations

from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey

CIPHERTEXT_SIZE: Final = 1088


class Encapsulated(NamedTuple):
    secret: bytes
    ciphertext: bytes


def generate() -> bytes:
    """A private key as its 64-byte seed."""
    return MLKEM768PrivateKey.generate().private_bytes_raw()


def public_key(seed: bytes) -> bytes:
    """1184 bytes."""
    return MLKEM768PrivateKey.from_seed_bytes(seed).public_key().public_bytes_raw()


def encapsulate(public: bytes) -> Encapsulated:
    """A fresh secret (32 bytes) and the ciphertext (1088 bytes) that tells it to the key's owner. Raises ValueError."""
    return Encapsulated(*MLKEM768PublicKey.from_public_bytes(public).encapsulate())


def decapsulate(seed: bytes, ciphertext: bytes) -> bytes:
    """The secret of a ciphertext. One made for another key gives another secret, not an error.

    Raises ValueError for a ciphertext of the wrong length.
    """
    return MLKEM768PrivateKey.from_seed_bytes(seed).decapsulate(ciphertext)
