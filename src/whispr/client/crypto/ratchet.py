"""The Double Ratchet of one session, on the `doubleratchet` library with its recommended primitives.

X25519, HKDF-SHA-256 for the root chain, HMAC-SHA-256 for message chains, AES-256-CBC with HMAC-SHA-256 as AEAD.
"""

from __future__ import annotations

import json
import warnings
from typing import Annotated, Any, Final

import doubleratchet
import msgspec
from doubleratchet.recommended import (
    HashFunction,
    aead_aes_hmac,
    diffie_hellman_ratchet_curve25519,
    kdf_hkdf,
    kdf_separate_hmacs,
)

from whispr.client.failures import Undecryptable

from .agreement import completed

MAX_SKIP: Final = 1000
MAX_KEPT: Final = 2000


Counter = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class RatchetMessage(msgspec.Struct, frozen=True, array_like=True):
    """One message of a session on the wire (msgpack array). `session` is the 8-byte tag of the session."""

    session: bytes
    ratchet_key: bytes
    previous_length: Counter
    number: Counter
    ciphertext: bytes


class _RootChain(kdf_hkdf.KDF):
    @staticmethod
    def _get_hash_function() -> HashFunction:
        return HashFunction.SHA_256

    @staticmethod
    def _get_info() -> bytes:
        return b"whispr-ratchet-root-v1"


class _MessageChain(kdf_separate_hmacs.KDF):
    @staticmethod
    def _get_hash_function() -> HashFunction:
        return HashFunction.SHA_256


class _Aead(aead_aes_hmac.AEAD):
    @staticmethod
    def _get_hash_function() -> HashFunction:
        return HashFunction.SHA_256

    @staticmethod
    def _get_info() -> bytes:
        return b"whispr-ratchet-aead-v1"


class _Ratchet(doubleratchet.DoubleRatchet):
    @staticmethod
    def _build_associated_data(associated_data: bytes, header: doubleratchet.Header) -> bytes:
        return (
            len(associated_data).to_bytes(4, "big")
            + associated_data
            + header.ratchet_pub
            + header.previous_sending_chain_length.to_bytes(8, "big")
            + header.sending_chain_length.to_bytes(8, "big")
        )


_PARTS: Final[dict[str, Any]] = {
    "diffie_hellman_ratchet_class": diffie_hellman_ratchet_curve25519.DiffieHellmanRatchet,
    "root_chain_kdf": _RootChain,
    "message_chain_kdf": _MessageChain,
    "message_chain_constant": b"\x02\x01",
    "dos_protection_threshold": MAX_SKIP,
    "max_num_skipped_message_keys": MAX_KEPT,
    "aead": _Aead,
}


def start(
    tag: bytes, secret: bytes, peer_ratchet_key: bytes, plaintext: bytes, data: bytes
) -> tuple[bytes, RatchetMessage]:
    """Begin a session as initiator; returns its state and the first message. `data` is authenticated too."""
    ratchet, message = completed(
        _Ratchet.encrypt_initial_message(
            **_PARTS,
            shared_secret=secret,
            recipient_ratchet_pub=peer_ratchet_key,
            message=plaintext,
            associated_data=data,
        )
    )
    return _frozen(ratchet), _on_wire(tag, message)


def accept(
    secret: bytes, own_ratchet_key: bytes, message: RatchetMessage, data: bytes
) -> tuple[bytes, bytes]:
    """Begin a session as responder; returns its state and the plaintext. Raises Undecryptable."""
    with _refusals():
        ratchet, plaintext = completed(
            _Ratchet.decrypt_initial_message(
                **_PARTS,
                shared_secret=secret,
                own_ratchet_priv=own_ratchet_key,
                message=_off_wire(message),
                associated_data=data,
            )
        )
    return _frozen(ratchet), plaintext


def encrypt(tag: bytes, state: bytes, plaintext: bytes, data: bytes) -> tuple[bytes, RatchetMessage]:
    ratchet = _thawed(state)
    message = completed(ratchet.encrypt_message(plaintext, data))
    return _frozen(ratchet), _on_wire(tag, message)


def decrypt(state: bytes, message: RatchetMessage, data: bytes) -> tuple[bytes, bytes]:
    """The new state and the plaintext. Raises Undecryptable; `state` then stays valid."""
    ratchet = _thawed(state)
    with _refusals():
        plaintext = completed(ratchet.decrypt_message(_off_wire(message), data))
    return _frozen(ratchet), plaintext


class _refusals:  # noqa: N801 -- used like a function
    """Turns the library's exceptions, and what malformed keys raise below it, into Undecryptable."""

    def __enter__(self) -> None:
        # A long gap is normal for a device that was away; the library warns about it on stderr.
        self._quiet = warnings.catch_warnings()
        self._quiet.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._quiet.__exit__(None, None, None)
        if isinstance(error, doubleratchet.DuplicateMessageException):
            raise Undecryptable("duplicate") from error
        if isinstance(
            error,
            doubleratchet.AuthenticationFailedException
            | doubleratchet.DecryptionFailedException
            | doubleratchet.DoSProtectionException
            | ValueError
            | OverflowError,
        ):
            raise Undecryptable("failed") from error


def _frozen(ratchet: _Ratchet) -> bytes:
    return json.dumps(ratchet.json, separators=(",", ":")).encode()


def _thawed(state: bytes) -> _Ratchet:
    return _Ratchet.from_json(json.loads(state), **_PARTS)


def _on_wire(tag: bytes, message: doubleratchet.EncryptedMessage) -> RatchetMessage:
    header = message.header
    return RatchetMessage(
        tag,
        header.ratchet_pub,
        header.previous_sending_chain_length,
        header.sending_chain_length,
        message.ciphertext,
    )


def _off_wire(message: RatchetMessage) -> doubleratchet.EncryptedMessage:
    header = doubleratchet.Header(message.ratchet_key, message.previous_length, message.number)
    return doubleratchet.EncryptedMessage(header, message.ciphertext)
