"""X3DH key agreement (Signal's specification, revision 1) between two devices.

The answering side runs in the `x3dh` library. The initiating side is computed here, section 3.3 of the specification
word for word, for one reason: the library checks the signed prekey against the *identity* key (XEdDSA, or an identity
key that is itself Ed25519), while contracts sign it with a `signing_key` that a peer's client may have made
independently of its identity key. For devices whose two keys are related both ways give the same secret; the
tests run every pairing of the two implementations against each other.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
import x3dh
import xeddsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from x3dh.crypto_provider import HashFunction
from x3dh.models import BaseStateModel, IdentityKeyPairModel, SignedPreKeyPairModel
from x3dh.types import IdentityKeyFormat, SecretType

from whispr.client.failures import BadBundle, Undecryptable

from .identity import DeviceIdentity
from .prekeys import SignedPrekey
from .signing import verify

INFO: Final = b"whispr-x3dh-v1"

T = TypeVar("T")


class PrekeyBundle(msgspec.Struct, frozen=True):
    """Another device's public keys as the server hands them out. Keys are 32 bytes, the signature 64."""

    registration_id: int
    identity_key: bytes
    signing_key: bytes
    signed_prekey_id: int
    signed_prekey: bytes
    signed_prekey_signature: bytes
    one_time_prekey_id: int | None = None
    one_time_prekey: bytes | None = None

    def check(self) -> None:
        """Raises BadBundle unless the signing key vouches for the signed prekey."""
        if not verify(self.signing_key, self.signed_prekey, self.signed_prekey_signature):
            raise BadBundle("the signature of the signed prekey is wrong")


class Initiated(NamedTuple):
    secret: bytes
    associated_data: bytes
    ephemeral_key: bytes


class _Answering(x3dh.BaseState):
    @staticmethod
    def _encode_public_key(key_format: IdentityKeyFormat, pub: bytes) -> bytes:
        return pub


def initiate(own: DeviceIdentity, bundle: PrekeyBundle) -> Initiated:
    """Agree on a secret with the bundle's device. Raises BadBundle."""
    bundle.check()
    identity = X25519PrivateKey.from_private_bytes(own.private_key)
    ephemeral = X25519PrivateKey.generate()
    try:
        shares = _dh(identity, bundle.signed_prekey) + _dh(ephemeral, bundle.identity_key)
        shares += _dh(ephemeral, bundle.signed_prekey)
        if bundle.one_time_prekey is not None:
            shares += _dh(ephemeral, bundle.one_time_prekey)
    except ValueError as error:
        raise BadBundle("a public key is malformed or of low order") from error
    secret = HKDF(SHA256(), 32, salt=bytes(32), info=INFO).derive(b"\xff" * 32 + shares)
    associated_data = (
        own.identity_key + bundle.identity_key + _signing_keys(own.signing_key, bundle.signing_key)
    )
    return Initiated(secret, associated_data, ephemeral.public_key().public_bytes_raw())


def answer(
    own: DeviceIdentity,
    signed_prekey: SignedPrekey,
    one_time_key: bytes | None,
    peer_identity_key: bytes,
    peer_signing_key: bytes,
    ephemeral_key: bytes,
) -> tuple[bytes, bytes]:
    """The secret and associated data for an agreement a peer initiated. Raises Undecryptable.

    `one_time_key` is the private key of the one-time prekey the peer used, or None if it used none.
    """
    state = _Answering.from_model(
        BaseStateModel(
            identity_key=IdentityKeyPairModel(secret=own.seed, secret_type=SecretType.SEED),
            signed_pre_key=SignedPreKeyPairModel(
                priv=signed_prekey.private_key,
                sig=signed_prekey.signature,
                timestamp=int(signed_prekey.created_at),
            ),
            old_signed_pre_key=None,
            pre_keys=frozenset() if one_time_key is None else frozenset([one_time_key]),
        ),
        IdentityKeyFormat.CURVE_25519,
        HashFunction.SHA_256,
        INFO,
    )
    used = next(iter(state.bundle.pre_keys), None)
    header = x3dh.Header(
        identity_key=peer_identity_key,
        ephemeral_key=ephemeral_key,
        signed_pre_key=signed_prekey.public_key,
        pre_key=used,
    )
    appendix = _signing_keys(peer_signing_key, own.signing_key)
    try:
        secret, associated_data, _ = completed(
            state.get_shared_secret_passive(header, appendix, require_pre_key=False)
        )
    except (x3dh.KeyAgreementException, xeddsa.XEdDSAException, ValueError) as error:
        raise Undecryptable("failed") from error
    return secret, associated_data


def completed(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine of the ratchet libraries, which are `async` by signature but never wait for anything."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    coroutine.close()
    raise RuntimeError("a cryptographic operation tried to wait")


def _dh(private: X25519PrivateKey, public: bytes) -> bytes:
    return private.exchange(X25519PublicKey.from_public_bytes(public))


def _signing_keys(initiator: bytes, responder: bytes) -> bytes:
    # Bound into every message, so that a server that swaps one device's signing key breaks the session visibly.
    return initiator + responder
