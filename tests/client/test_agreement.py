"""PQXDH and X3DH: both sides agree on what was computed elsewhere, whatever the keys look like; forgeries are refused."""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path
from typing import Any

import msgspec
import pytest
import x3dh
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey
from x3dh.crypto_provider import HashFunction
from x3dh.identity_key_pair import IdentityKeyPairSeed
from x3dh.types import IdentityKeyFormat

from whispr.client.crypto import kem
from whispr.client.crypto.agreement import (
    X3DH_INFO,
    Decapsulation,
    PrekeyBundle,
    answer,
    completed,
    initiate,
)
from whispr.client.crypto.identity import DeviceIdentity, fingerprint
from whispr.client.crypto.prekeys import PqPrekey, SignedPrekey
from whispr.client.failures import BadBundle, Undecryptable


class LibraryState(x3dh.BaseState):
    @staticmethod
    def _encode_public_key(key_format: IdentityKeyFormat, pub: bytes) -> bytes:
        return pub


def signed_prekey(identity: DeviceIdentity) -> SignedPrekey:
    key = X25519PrivateKey.generate()
    signature = identity.sign(key.public_key().public_bytes_raw())
    return SignedPrekey(7, key.private_bytes_raw(), signature, 1.0)


def pq_prekey(identity: DeviceIdentity, key_id: int = 5) -> PqPrekey:
    seed = kem.generate()
    return PqPrekey(key_id, seed, identity.sign(kem.public_key(seed)), 1.0)


def bundle_of(
    identity: DeviceIdentity,
    prekey: SignedPrekey,
    one_time: X25519PrivateKey | None,
    pq: PqPrekey | None = None,
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
        None if pq is None else pq.key_id,
        None if pq is None else pq.public_key,
        None if pq is None else pq.signature,
    )


VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("agreement_vectors.json").read_text())


@pytest.mark.parametrize("expected", VECTORS["agreements"])
def test_both_sides_derive_what_was_computed_without_them(
    expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob = (
        DeviceIdentity(bytes.fromhex(VECTORS[f"{who}_seed"]), 1) for who in ("initiator", "responder")
    )
    private = X25519PrivateKey.from_private_bytes(bytes.fromhex(VECTORS["signed_prekey"]))
    public = private.public_key().public_bytes_raw()
    prekey = SignedPrekey(7, private.private_bytes_raw(), bob.sign(public), 1.0)
    one_time = X25519PrivateKey.from_private_bytes(bytes.fromhex(VECTORS["one_time_prekey"]))
    ephemeral = X25519PrivateKey.from_private_bytes(bytes.fromhex(VECTORS["ephemeral_key"]))
    seed, ciphertext = bytes.fromhex(VECTORS["pq_prekey_seed"]), bytes.fromhex(VECTORS["kem_ciphertext"])
    assert hashlib.sha256(kem.public_key(seed)).hexdigest() == VECTORS["pq_prekey_sha256"]
    pq = PqPrekey(VECTORS["pq_prekey_id"], seed, bob.sign(kem.public_key(seed)), 1.0)
    used = one_time if expected["one_time_prekey"] else None
    used_pq = pq if expected["post_quantum"] else None
    agreed = (bytes.fromhex(expected["secret"]), bytes.fromhex(expected["associated_data"]))
    answered = answer(
        bob,
        prekey,
        used.private_bytes_raw() if used else None,
        alice.identity_key,
        alice.signing_key,
        ephemeral.public_key().public_bytes_raw(),
        Decapsulation(used_pq, ciphertext) if used_pq else None,
    )
    assert answered == agreed
    # The initiating side draws two things by lot; here they are the file's.
    drawn = kem.Encapsulated(bytes.fromhex(VECTORS["kem_secret"]), ciphertext)
    monkeypatch.setattr(kem, "encapsulate", lambda public: drawn)
    monkeypatch.setattr(X25519PrivateKey, "generate", lambda: ephemeral)
    ours = initiate(alice, bundle_of(bob, prekey, used, used_pq))
    assert (ours.secret, ours.associated_data) == agreed
    assert ours.kem_ciphertext == (ciphertext if used_pq else None)


@settings(max_examples=40, deadline=None)
@given(one_time=st.booleans(), changed=st.sampled_from(["nothing", "ciphertext", "key", "id", "left out"]))
def test_the_secret_is_shared_if_and_only_if_the_kem_half_is_the_same(one_time: bool, changed: str) -> None:
    alice, bob = DeviceIdentity.generate(), DeviceIdentity.generate()
    prekey, pq = signed_prekey(bob), pq_prekey(bob)
    key = X25519PrivateKey.generate() if one_time else None
    ours = initiate(alice, bundle_of(bob, prekey, key, pq), require_post_quantum=True)
    assert ours.kem_ciphertext is not None
    half: Decapsulation | None = Decapsulation(pq, ours.kem_ciphertext)
    if changed == "ciphertext":
        half = Decapsulation(pq, ours.kem_ciphertext[:-1] + bytes([ours.kem_ciphertext[-1] ^ 1]))
    elif changed == "key":
        half = Decapsulation(pq_prekey(bob), ours.kem_ciphertext)
    elif changed == "id":
        half = Decapsulation(msgspec.structs.replace(pq, key_id=6), ours.kem_ciphertext)
    elif changed == "left out":
        half = None
    secret, data = answer(
        bob,
        prekey,
        key.private_bytes_raw() if key else None,
        alice.identity_key,
        alice.signing_key,
        ours.ephemeral_key,
        half,
    )
    assert ((secret, data) == (ours.secret, ours.associated_data)) == (changed == "nothing")
    assert (secret == ours.secret) == (changed in ("nothing", "id"))


def test_a_post_quantum_prekey_is_only_used_when_the_device_signed_it() -> None:
    alice, bob, mallory = (DeviceIdentity.generate() for _ in range(3))
    prekey = signed_prekey(bob)
    good = bundle_of(bob, prekey, None, pq_prekey(bob))
    swapped = pq_prekey(mallory)
    for bad in (
        msgspec.structs.replace(good, pq_prekey=swapped.public_key),
        msgspec.structs.replace(good, pq_prekey=swapped.public_key, pq_prekey_signature=swapped.signature),
        msgspec.structs.replace(good, pq_prekey_signature=None),
        msgspec.structs.replace(good, pq_prekey=b"short", pq_prekey_signature=bob.sign(b"short")),
    ):
        with pytest.raises(BadBundle):
            initiate(alice, bad)
    with pytest.raises(BadBundle):
        initiate(alice, bundle_of(bob, prekey, None), require_post_quantum=True)
    for length in (0, 1087, 1089):
        half = Decapsulation(pq_prekey(bob), bytes(length))
        with pytest.raises(Undecryptable):
            answer(bob, prekey, None, alice.identity_key, alice.signing_key, prekey.public_key, half)


@pytest.mark.parametrize("post_quantum", [True, False])
@pytest.mark.parametrize("with_one_time_key", [True, False])
def test_both_sides_agree(with_one_time_key: bool, post_quantum: bool) -> None:
    alice, bob = DeviceIdentity.generate(), DeviceIdentity.generate()
    prekey = signed_prekey(bob)
    one_time = X25519PrivateKey.generate() if with_one_time_key else None
    pq = pq_prekey(bob) if post_quantum else None
    ours = initiate(alice, bundle_of(bob, prekey, one_time, pq))
    secret, data = answer(
        bob,
        prekey,
        one_time.private_bytes_raw() if one_time else None,
        alice.identity_key,
        alice.signing_key,
        ours.ephemeral_key,
        Decapsulation(pq, ours.kem_ciphertext) if pq and ours.kem_ciphertext else None,
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
        IdentityKeyFormat.ED_25519, HashFunction.SHA_256, X3DH_INFO, IdentityKeyPairSeed(bob_seed)
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
        IdentityKeyFormat.ED_25519, HashFunction.SHA_256, X3DH_INFO, IdentityKeyPairSeed(alice.seed)
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
    assert HKDF(SHA256(), 32, bytes(32), X3DH_INFO).derive(b"\xff" * 32 + shares) == ours.secret


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
