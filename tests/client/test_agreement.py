"""X3DH: both implementations agree, whatever the peer's keys look like; forgeries are refused."""

from __future__ import annotations

import secrets

import msgspec
import pytest
import x3dh
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from nacl.signing import SigningKey
from x3dh.crypto_provider import HashFunction
from x3dh.identity_key_pair import IdentityKeyPairSeed
from x3dh.types import IdentityKeyFormat

from whispr.client.crypto.agreement import INFO, PrekeyBundle, answer, completed, initiate
from whispr.client.crypto.identity import DeviceIdentity, fingerprint
from whispr.client.crypto.prekeys import SignedPrekey
from whispr.client.failures import BadBundle, Undecryptable


class LibraryState(x3dh.BaseState):
    @staticmethod
    def _encode_public_key(key_format: IdentityKeyFormat, pub: bytes) -> bytes:
        return pub


def signed_prekey(identity: DeviceIdentity) -> SignedPrekey:
    key = X25519PrivateKey.generate()
    signature = identity.sign(key.public_key().public_bytes_raw())
    return SignedPrekey(7, key.private_bytes_raw(), signature, 1.0)


def bundle_of(
    identity: DeviceIdentity, prekey: SignedPrekey, one_time: X25519PrivateKey | None
) -> PrekeyBundle:
    return PrekeyBundle(
        identity.registration_id,
        identity.identity_key,
        identity.signing_key,
        prekey.key_id,
        prekey.public_key,
        prekey.signature,
        None if one_time is None else 3,
        None if one_time is None else one_time.public_key().public_bytes_raw(),
    )


@pytest.mark.parametrize("with_one_time_key", [True, False])
def test_both_sides_agree(with_one_time_key: bool) -> None:
    alice, bob = DeviceIdentity.generate(), DeviceIdentity.generate()
    prekey = signed_prekey(bob)
    one_time = X25519PrivateKey.generate() if with_one_time_key else None
    ours = initiate(alice, bundle_of(bob, prekey, one_time))
    secret, data = answer(
        bob,
        prekey,
        one_time.private_bytes_raw() if one_time else None,
        alice.identity_key,
        alice.signing_key,
        ours.ephemeral_key,
    )
    assert secret == ours.secret
    assert data == ours.associated_data
    assert alice.signing_key in data
    assert bob.signing_key in data


def test_our_initiator_agrees_with_the_library_as_responder_and_the_other_way_round() -> None:
    alice = DeviceIdentity.generate()
    bob_seed = secrets.token_bytes(32)
    bob = DeviceIdentity(bob_seed, 1)
    state = LibraryState.create(
        IdentityKeyFormat.ED_25519, HashFunction.SHA_256, INFO, IdentityKeyPairSeed(bob_seed)
    )
    state.generate_pre_keys(1)
    published = state.bundle
    # In the library's Ed25519 format the identity key is our signing key, and its signature is contracts' signature.
    assert published.identity_key == bob.signing_key
    (one_time_key,) = published.pre_keys
    bundle = PrekeyBundle(
        1,
        bob.identity_key,
        bob.signing_key,
        1,
        published.signed_pre_key,
        published.signed_pre_key_sig,
        1,
        one_time_key,
    )
    ours = initiate(alice, bundle)
    header = x3dh.Header(alice.signing_key, ours.ephemeral_key, published.signed_pre_key, one_time_key)
    theirs, _, _ = completed(state.get_shared_secret_passive(header))
    assert theirs == ours.secret

    alice_state = LibraryState.create(
        IdentityKeyFormat.ED_25519, HashFunction.SHA_256, INFO, IdentityKeyPairSeed(alice.seed)
    )
    prekey = signed_prekey(bob)
    library_bundle = x3dh.Bundle(bob.signing_key, prekey.public_key, prekey.signature, frozenset())
    theirs, _, header = completed(alice_state.get_shared_secret_active(library_bundle, require_pre_key=False))
    ours_secret, _ = answer(bob, prekey, None, alice.identity_key, alice.signing_key, header.ephemeral_key)
    assert ours_secret == theirs


def test_a_peer_with_unrelated_identity_and_signing_keys_is_served() -> None:
    alice = DeviceIdentity.generate()
    identity, signing, prekey = (
        X25519PrivateKey.generate(),
        SigningKey.generate(),
        X25519PrivateKey.generate(),
    )
    public = prekey.public_key().public_bytes_raw()
    bundle = PrekeyBundle(
        9,
        identity.public_key().public_bytes_raw(),
        bytes(signing.verify_key),
        1,
        public,
        signing.sign(public).signature,
    )
    ours = initiate(alice, bundle)
    # The peer's side by hand.
    alice_key = X25519PublicKey.from_public_bytes(alice.identity_key)
    ephemeral = X25519PublicKey.from_public_bytes(ours.ephemeral_key)
    shares = prekey.exchange(alice_key) + identity.exchange(ephemeral) + prekey.exchange(ephemeral)
    assert HKDF(SHA256(), 32, bytes(32), INFO).derive(b"\xff" * 32 + shares) == ours.secret


def test_a_bundle_whose_signature_is_wrong_is_refused() -> None:
    alice, bob, mallory = (DeviceIdentity.generate() for _ in range(3))
    prekey = signed_prekey(mallory)
    with pytest.raises(BadBundle):
        initiate(alice, bundle_of(bob, prekey, None))


def test_low_order_and_malformed_keys_are_refused() -> None:
    alice, bob = DeviceIdentity.generate(), DeviceIdentity.generate()
    prekey = signed_prekey(bob)
    good = bundle_of(bob, prekey, None)
    for bad in (bytes(32), b"short"):
        with pytest.raises(BadBundle):
            initiate(alice, msgspec.structs.replace(good, identity_key=bad))
        with pytest.raises(Undecryptable):
            answer(bob, prekey, None, bad, alice.signing_key, initiate(alice, good).ephemeral_key)
        with pytest.raises(Undecryptable):
            answer(bob, prekey, None, alice.identity_key, alice.signing_key, bad)


def test_a_fingerprint_depends_on_both_keys() -> None:
    one, two = DeviceIdentity.generate(), DeviceIdentity.generate()
    shown = fingerprint(one.identity_key, one.signing_key)
    assert len(shown.split()) == 12
    assert shown == fingerprint(one.identity_key, one.signing_key)
    assert shown != fingerprint(one.identity_key, two.signing_key)
    assert shown != fingerprint(two.identity_key, one.signing_key)
