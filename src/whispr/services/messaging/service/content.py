"""What a message may hold, its canonical form, and what its signature covers. Pure: no clock, no caller, no store."""

from __future__ import annotations

import binascii
from hashlib import sha256
from typing import Annotated, Final, Literal

import msgspec

from whispr.kit.ids import parse_id
from whispr.services.messaging.models import (
    MAX_CONTENT_BYTES,
    MESSAGE_TYPES,
    BadSignature,
    ContentTooLarge,
    Draft,
    InvalidContent,
    InvalidMessageType,
)

SIGNATURE_CONTEXT: Final = b"whispr-message-v1"
SIGNATURE_BYTES: Final = 64
COMMITMENT_BYTES: Final = 32


class Envelope(msgspec.Struct, forbid_unknown_fields=True):
    """One device's ciphertext. `registration_id`: the installation it was made for, if the sender says."""

    body: str
    type: Literal["prekey", "message", "sender_key"]
    registration_id: Annotated[int, msgspec.Meta(ge=1, le=16380)] | msgspec.UnsetType = msgspec.UNSET


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    ciphertext: str | msgspec.UnsetType = msgspec.UNSET
    commitment: str | msgspec.UnsetType = msgspec.UNSET
    envelopes: dict[str, Envelope] | msgspec.UnsetType = msgspec.UNSET


class Parsed(msgspec.Struct, frozen=True):
    """A draft whose content is well-formed.

    `canonical` is the content as it is stored, `signed` the 32 bytes that the signature covers. `envelopes` is by the
    text of the device's id, None for a shared ciphertext.
    """

    draft: Draft
    canonical: bytes
    content_sha256: bytes
    signed: bytes
    envelopes: dict[str, Envelope] | None


_decode = msgspec.json.Decoder(_Body).decode
_encode_sorted = msgspec.json.Encoder(order="sorted").encode


def canonical_json(content: bytes) -> tuple[bytes, dict[str, Envelope] | None]:
    """CONTENT in canonical form (keys sorted, no spaces, UTF-8), and its envelopes if it has any.

    Raises `InvalidContent` unless it is exactly one of `ciphertext` and `envelopes` with strict base64 inside, and beside
    it at most a `commitment` to the plaintext, by which a report can be verified.
    """
    try:
        body = _decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidContent(str(error) if isinstance(error, msgspec.ValidationError) else None) from None
    if body.commitment is not msgspec.UNSET:
        _require_commitment(body.commitment)
    if body.ciphertext is not msgspec.UNSET and body.envelopes is msgspec.UNSET:
        _require_base64(body.ciphertext)
        return _encode_sorted(body), None
    if body.envelopes is not msgspec.UNSET and body.ciphertext is msgspec.UNSET:
        for device, envelope in body.envelopes.items():
            _require_id(device)
            _require_base64(envelope.body)
        return _encode_sorted(body), body.envelopes
    raise InvalidContent


def parse(draft: Draft) -> Parsed:
    """Check everything about `draft` that depends on nothing else.

    Raises `InvalidMessageType`, `InvalidContent`, `ContentTooLarge`, `BadSignature` (of the wrong length).
    """
    if draft.message_type not in MESSAGE_TYPES:
        raise InvalidMessageType
    if len(draft.signature) != SIGNATURE_BYTES:
        raise BadSignature
    canonical, envelopes = canonical_json(draft.content)
    if len(canonical) > MAX_CONTENT_BYTES:
        raise ContentTooLarge
    digest = sha256(canonical).digest()
    signed = sha256(SIGNATURE_CONTEXT + draft.conversation_id.bytes + draft.client_id.bytes + digest).digest()
    return Parsed(draft, canonical, digest, signed, envelopes)


def _require_id(text: str) -> None:
    # It is part of what is signed, so only the form that everybody would write is taken.
    try:
        is_canonical = str(parse_id(text)) == text
    except ValueError:
        is_canonical = False
    if not is_canonical:
        raise InvalidContent("Envelopes are named by the ids of devices, in lower case and with hyphens.")


def _require_base64(text: str) -> None:
    try:
        decoded = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise InvalidContent("A ciphertext or envelope body is not base64.") from None
    if not decoded:
        raise InvalidContent("A ciphertext or envelope body is empty.")


def _require_commitment(text: str) -> None:
    try:
        size = len(binascii.a2b_base64(text, strict_mode=True))
    except ValueError:
        size = 0
    if size != COMMITMENT_BYTES:
        raise InvalidContent(f"The commitment is not the base64 of {COMMITMENT_BYTES} bytes.")
