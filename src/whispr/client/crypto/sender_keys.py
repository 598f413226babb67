"""Sender keys: one ciphertext for a whole group.

Each device has a chain per group: an HMAC-SHA-256 chain key that steps with every message and an Ed25519 key that signs
every message, so that no other holder of the chain can forge one. The chain's present key travels to the other
devices through pairwise sessions; who gets it later reads nothing earlier. A chain is replaced when a device that
holds it leaves, and after `MAX_MESSAGES` messages or `MAX_AGE` seconds.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from typing import Final
from uuid import UUID

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from nacl.signing import SigningKey

from whispr.client.failures import Undecryptable
from whispr.client.store import Store

from .ratchet import Counter
from .signing import verify

MAX_MESSAGES: Final = 1000
MAX_AGE: Final = 7 * 86400.0
MAX_SKIP: Final = 2000
MAX_CHAINS: Final = 5

_OWN = "own_sender_chains"
_THEIRS = "sender_chains"


class Distribution(msgspec.Struct, frozen=True, array_like=True):
    """What another device needs to read a chain from `number` on."""

    chain_id: bytes
    number: Counter
    chain_key: bytes
    verify_key: bytes


class GroupMessage(msgspec.Struct, frozen=True, array_like=True):
    """A group ciphertext on the wire (msgpack array)."""

    chain_id: bytes
    number: Counter
    ciphertext: bytes
    signature: bytes

    @classmethod
    def parse(cls, body: bytes) -> GroupMessage:
        """Raises Undecryptable (malformed)."""
        try:
            return msgspec.msgpack.decode(body, type=cls)
        except msgspec.DecodeError as error:
            raise Undecryptable("malformed") from error


class _OwnChain(msgspec.Struct):
    chain_id: bytes
    number: int
    chain_key: bytes
    signing_seed: bytes
    created_at: float
    # Device id to the registration id that was given the chain.
    holders: dict[str, int] = {}
    # The log's number of the first message that gave it; 0 while there is none.
    given_at: int = 0


class _Chain(msgspec.Struct):
    chain_id: bytes
    number: int
    chain_key: bytes
    verify_key: bytes
    skipped: dict[int, bytes] = {}


class SenderKeys:
    """Chains by conversation. Changes need an open store transaction. `now` gives epoch seconds."""

    def __init__(self, store: Store, now: Callable[[], float]) -> None:
        self._store = store
        self._now = now

    def holders(self, conversation_id: UUID) -> dict[UUID, int]:
        """Devices (with registration id) known to hold the present chain; empty when a new chain is due."""
        chain = self._own(conversation_id)
        return {UUID(device): registration for device, registration in chain.holders.items()} if chain else {}

    def rotate(self, conversation_id: UUID) -> None:
        """Begin a new chain with the next message."""
        self._store.delete(_OWN, str(conversation_id))

    def encrypt(
        self, conversation_id: UUID, plaintext: bytes, data: bytes
    ) -> tuple[GroupMessage, Distribution]:
        """One step of the chain. The distribution lets its reader open this message and later ones."""
        chain = self._own(conversation_id) or self._fresh()
        distribution = Distribution(
            chain.chain_id, chain.number, chain.chain_key, bytes(SigningKey(chain.signing_seed).verify_key)
        )
        header = _header(chain.chain_id, chain.number, data)
        key, nonce = _message_key(chain.chain_key)
        ciphertext = AESGCM(key).encrypt(nonce, plaintext, header)
        signature = SigningKey(chain.signing_seed).sign(header + ciphertext).signature
        message = GroupMessage(chain.chain_id, chain.number, ciphertext, signature)
        chain.number, chain.chain_key = chain.number + 1, _next(chain.chain_key)
        self._store.save(_OWN, str(conversation_id), chain)
        return message, distribution

    def purged(self, conversation_id: UUID, until_seq: int) -> None:
        """Messages up to `until_seq` are gone: begin anew if the chain was given in one that somebody may have missed."""
        chain = self._own(conversation_id)
        if chain is not None and 0 < chain.given_at <= until_seq:
            self.rotate(conversation_id)

    def distributed(self, conversation_id: UUID, chain_id: bytes, devices: dict[UUID, int], seq: int) -> None:
        """Note that the server took a message, as number `seq`, that carried the chain to these devices."""
        chain = self._own(conversation_id)
        if chain is not None and chain.chain_id == chain_id:
            chain.given_at = chain.given_at or seq
            chain.holders.update({str(device): registration for device, registration in devices.items()})
            self._store.save(_OWN, str(conversation_id), chain)

    def receive(self, conversation_id: UUID, device_id: UUID, distribution: Distribution) -> None:
        """Keep a chain another device sent. A chain that is known already stays as far as it has come."""
        chains = self._theirs(conversation_id, device_id)
        if any(chain.chain_id == distribution.chain_id for chain in chains):
            return
        chain = _Chain(
            distribution.chain_id, distribution.number, distribution.chain_key, distribution.verify_key
        )
        self._save(conversation_id, device_id, [chain, *chains][:MAX_CHAINS])

    def decrypt(self, conversation_id: UUID, device_id: UUID, message: GroupMessage, data: bytes) -> bytes:
        """Raises Undecryptable (no_sender_key, bad_signature, duplicate, failed); nothing has changed then."""
        chains = self._theirs(conversation_id, device_id)
        chain = next((chain for chain in chains if chain.chain_id == message.chain_id), None)
        if chain is None:
            raise Undecryptable("no_sender_key")
        header = _header(message.chain_id, message.number, data)
        if not verify(chain.verify_key, header + message.ciphertext, message.signature):
            raise Undecryptable("bad_signature")
        key, nonce = _derive(_advance(chain, message.number))
        try:
            plaintext = AESGCM(key).decrypt(nonce, message.ciphertext, header)
        except InvalidTag as error:
            raise Undecryptable("failed") from error
        self._save(conversation_id, device_id, chains)
        return plaintext

    def _own(self, conversation_id: UUID) -> _OwnChain | None:
        chain = self._store.load(_OWN, str(conversation_id), _OwnChain)
        if chain and chain.number < MAX_MESSAGES and self._now() - chain.created_at < MAX_AGE:
            return chain
        return None

    def _fresh(self) -> _OwnChain:
        return _OwnChain(os.urandom(16), 0, os.urandom(32), os.urandom(32), self._now())

    def _theirs(self, conversation_id: UUID, device_id: UUID) -> list[_Chain]:
        return self._store.load(_THEIRS, f"{conversation_id}/{device_id}", list[_Chain]) or []

    def _save(self, conversation_id: UUID, device_id: UUID, chains: list[_Chain]) -> None:
        self._store.save(_THEIRS, f"{conversation_id}/{device_id}", chains)


def _advance(chain: _Chain, number: int) -> bytes:
    """The message seed of `number`; those passed over are kept for messages that come late."""
    if number < chain.number:
        seed = chain.skipped.pop(number, None)
        if seed is None:
            raise Undecryptable("duplicate")
        return seed
    if number - chain.number > MAX_SKIP:
        # Each step costs an HMAC and a stored key; without a bound one message could cost hours.
        raise Undecryptable("failed")
    while chain.number < number:
        chain.skipped[chain.number] = _seed(chain.chain_key)
        chain.number, chain.chain_key = chain.number + 1, _next(chain.chain_key)
    while len(chain.skipped) > MAX_SKIP:
        chain.skipped.pop(next(iter(chain.skipped)))
    seed = _seed(chain.chain_key)
    chain.number, chain.chain_key = chain.number + 1, _next(chain.chain_key)
    return seed


def _header(chain_id: bytes, number: int, data: bytes) -> bytes:
    return b"whispr-sender-key-v1" + chain_id + number.to_bytes(4, "big") + data


def _seed(chain_key: bytes) -> bytes:
    return hmac.digest(chain_key, b"\x01", hashlib.sha256)


def _next(chain_key: bytes) -> bytes:
    return hmac.digest(chain_key, b"\x02", hashlib.sha256)


def _message_key(chain_key: bytes) -> tuple[bytes, bytes]:
    return _derive(_seed(chain_key))


def _derive(seed: bytes) -> tuple[bytes, bytes]:
    material = HKDF(SHA256(), 44, salt=bytes(32), info=b"whispr-sender-key-message-v1").derive(seed)
    return material[:32], material[32:]
