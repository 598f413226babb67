"""Sealing: AES-256-GCM under the root keys, which are outside the database, and under keys derived from a secret."""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from whispr.services.auth.models import RootKeys

NONCE_BYTES = 12


class Unreadable(Exception):
    """Something sealed cannot be opened: its root key is missing, or it was tampered with."""


class Vault:
    """Seals keys under the primary root key and opens what any root key of the ring sealed."""

    def __init__(self, root: RootKeys) -> None:
        self._primary = root.primary
        self._ciphers = {name: AESGCM(key) for name, key in root.keys.items()}

    @property
    def primary(self) -> str:
        return self._primary

    def holds(self, root_key_id: str) -> bool:
        return root_key_id in self._ciphers

    def seal(self, secret: bytes, purpose: str) -> bytes:
        """`nonce ‖ ciphertext` under the primary key, bound to `purpose`."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._ciphers[self._primary].encrypt(nonce, secret, purpose.encode())

    def open(self, root_key_id: str, sealed: bytes, purpose: str) -> bytes:
        """What was sealed. Raises `Unreadable`."""
        cipher = self._ciphers.get(root_key_id)
        if cipher is None:
            raise Unreadable(f"root key {root_key_id} is not in the ring")
        try:
            return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], purpose.encode())
        except InvalidTag:
            raise Unreadable(f"{purpose} does not open under root key {root_key_id}") from None


def seal_under(secret: bytes, content: bytes, purpose: bytes) -> bytes:
    """`content` readable only with `secret`. Use a secret once for one purpose: the nonce is fixed."""
    return AESGCM(_derive(secret, purpose)).encrypt(b"\0" * NONCE_BYTES, content, purpose)


def open_under(secret: bytes, sealed: bytes, purpose: bytes) -> bytes:
    """What `seal_under` sealed. Raises `Unreadable`."""
    try:
        return AESGCM(_derive(secret, purpose)).decrypt(b"\0" * NONCE_BYTES, sealed, purpose)
    except InvalidTag:
        raise Unreadable("the secret does not open this") from None


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=None, info=purpose).derive(secret)
