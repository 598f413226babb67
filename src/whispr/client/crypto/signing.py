"""The signature every message carries, and the canonical form of content it is made over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

DOMAIN: Final = b"whispr-message-v1"


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """Keys sorted, no spaces, UTF-8: the same bytes on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def content_sha256(content: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(canonical_json(content)).digest()


def message_digest(conversation_id: UUID, client_id: UUID, content_digest: bytes) -> bytes:
    """What a device signs: 32 bytes over the conversation, the client id and the content's SHA-256."""
    return hashlib.sha256(DOMAIN + conversation_id.bytes + client_id.bytes + content_digest).digest()


def verify(signing_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (Ed25519, 64 bytes) over `message` was made by `signing_key` (32 bytes)."""
    try:
        VerifyKey(signing_key).verify(message, signature)
    except (BadSignatureError, ValueError):
        return False
    return True
