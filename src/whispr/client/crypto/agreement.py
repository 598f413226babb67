"""Key agreement between two devices: PQXDH (Signal's specification, revision 3), or X3DH where no KEM key is offered.

Both are one computation: the Diffie-Hellman shares of X3DH, and in PQXDH the secret of an ML-KEM-768 encapsulation
behind them, go through one HKDF. The two have different HKDF `info`, so neither can be taken for the other. Contracts
sign prekeys with a `signing_key` that a peer's client may have made independently of its identity key; that is why this
is not the `x3dh` library, which checks against the identity key. The tests run both against each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Coroutine
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from whispr.client.failures import BadBundle, Undecryptable

from . import kem
from .identity import DeviceIdentity
from .prekeys import PqPrekey, SignedPrekey
from .signing import verify

X3DH_INFO: Final = b"whispr-x3dh-v1"
PQXDH_INFO: Final = b"whispr-pqxdh-v1_CURVE25519_SHA-256_ML-KEM-768"

T = TypeVar("T")


class PrekeyBundle(msgspec.Struct, frozen=True):
    """Another device's public keys as the server hands them out.

    X25519 and Ed25519 keys are 32 bytes, the ML-KEM key 1184, signatures 64.
    """

    registration_id: int
    identity_key: bytes
    signing_key: bytes
    signed_prekey_id: int
    signed_prekey: bytes
    signed_prekey_signature: bytes
    one_time_prekey_id: int | None = None
    one_time_prekey: bytes | None = None
    pq_prekey_id: int | None = None
    pq_prekey: bytes | None = None
    pq_prekey_signature: bytes | None = None

    def check(self) -> None:
        """Raises BadBundle unless the signing key vouches for the signed prekey, and the KEM key if there is one."""
        if not verify(self.signing_key, self.signed_prekey, self.signed_prekey_signature):
            raise BadBundle("the signature of the signed prekey is wrong")
        if self.pq_prekey is not None and not verify(
            self.signing_key, self.pq_prekey, self.pq_prekey_signature or b""
        ):
            raise BadBundle("the signature of the post-quantum prekey is wrong")


class Initiated(NamedTuple):
    """`kem_ciphertext` is for the bundle's KEM key; None for X3DH."""

    secret: bytes
    associated_data: bytes
    ephemeral_key: bytes
    kem_ciphertext: bytes | None


class Decapsulation(NamedTuple):
    """The KEM half of an agreement to answer."""

    prekey: PqPrekey
    ciphertext: bytes


def initiate(own: DeviceIdentity, bundle: PrekeyBundle, *, require_post_quantum: bool = False) -> Initiated:
    """Agree on a secret with the bundle's device. Raises BadBundle."""
    bundle.check()
    if require_post_quantum and bundle.pq_prekey is None:
        raise BadBundle("the device offers no post-quantum prekey")
    identity = X25519PrivateKey.from_private_bytes(own.private_key)
    ephemeral = X25519PrivateKey.generate()
    encapsulated: kem.Encapsulated | None = None
    try:
        shares = _dh(identity, bundle.signed_prekey) + _dh(ephemeral, bundle.identity_key)
        shares += _dh(ephemeral, bundle.signed_prekey)
        if bundle.one_time_prekey is not None:
            shares += _dh(ephemeral, bundle.one_time_prekey)
        if bundle.pq_prekey is not None:
            encapsulated = kem.encapsulate(bundle.pq_prekey)
    except ValueError as error:
        raise BadBundle("a public key is malformed or of low order") from error
    data = own.identity_key + bundle.identity_key + own.signing_key + bundle.signing_key
    if bundle.pq_prekey is not None:
        data += _kem_key(bundle.pq_prekey_id or 0, bundle.pq_prekey)
    return Initiated(
        _derive(shares, encapsulated.secret if encapsulated else None),
        data,
        ephemeral.public_key().public_bytes_raw(),
        encapsulated.ciphertext if encapsulated else None,
    )


def answer(
    own: DeviceIdentity,
    signed_prekey: SignedPrekey,
    one_time_key: bytes | None,
    peer_identity_key: bytes,
    peer_signing_key: bytes,
    ephemeral_key: bytes,
    post_quantum: Decapsulation | None = None,
) -> tuple[bytes, bytes]:
    """The secret and associated data for an agreement a peer initiated. Raises Undecryptable.

    `one_time_key` is the private key of the one-time prekey the peer used, or None if it used none.
    """
    kem_secret: bytes | None = None
    try:
        prekey = X25519PrivateKey.from_private_bytes(signed_prekey.private_key)
        identity = X25519PrivateKey.from_private_bytes(own.private_key)
        shares = _dh(prekey, peer_identity_key) + _dh(identity, ephemeral_key) + _dh(prekey, ephemeral_key)
        if one_time_key is not None:
            shares += _dh(X25519PrivateKey.from_private_bytes(one_time_key), ephemeral_key)
        if post_quantum is not None:
            kem_secret = kem.decapsulate(post_quantum.prekey.seed, post_quantum.ciphertext)
    except ValueError as error:
        raise Undecryptable("failed") from error
    data = peer_identity_key + own.identity_key + peer_signing_key + own.signing_key
    if post_quantum is not None:
        data += _kem_key(post_quantum.prekey.key_id, post_quantum.prekey.public_key)
    return _derive(shares, kem_secret), data


def completed(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine of the ratchet library, which is `async` by signature but never waits for anything."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    coroutine.close()
    raise RuntimeError("a cryptographic operation tried to wait")


def _derive(shares: bytes, kem_secret: bytes | None) -> bytes:
    info = X3DH_INFO if kem_secret is None else PQXDH_INFO
    material = b"\xff" * 32 + shares + (kem_secret or b"")
    return HKDF(SHA256(), 32, salt=bytes(32), info=info).derive(material)


def _dh(private: X25519PrivateKey, public: bytes) -> bytes:
    return private.exchange(X25519PublicKey.from_public_bytes(public))


# The associated data is bound into every message, so that a server that swaps a device's signing key or names another
# KEM key breaks the session visibly. It stands for the KEM key by id and digest: the key itself is 1184 bytes.
def _kem_key(key_id: int, public: bytes) -> bytes:
    return key_id.to_bytes(4, "big") + hashlib.sha256(public).digest()
