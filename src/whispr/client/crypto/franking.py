"""Message franking: a commitment to the plaintext beside the ciphertext, so that a report can be verified later.

The server keeps the commitment and learns nothing from it. Whoever received the message can reveal plaintext and key,
and the server can tell that this, and nothing else, is what the sender committed to.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Final

KEY_SIZE: Final = 32


def new_key() -> bytes:
    return os.urandom(KEY_SIZE)


def commit(key: bytes, plaintext: bytes) -> bytes:
    """32 bytes."""
    return hmac.digest(key, plaintext, hashlib.sha256)


def matches(commitment: bytes, key: bytes, plaintext: bytes) -> bool:
    # A key of another length could have a twin: HMAC hashes keys longer than its block.
    return len(key) == KEY_SIZE and hmac.compare_digest(commitment, commit(key, plaintext))
