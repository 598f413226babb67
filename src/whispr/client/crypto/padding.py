"""Plaintexts are padded to multiples of 160 bytes, so that lengths on the wire tell little."""

from __future__ import annotations

from typing import Final

from whispr.client.failures import Undecryptable

BLOCK: Final = 160


def pad(plaintext: bytes) -> bytes:
    """Append 0x80 and zeros up to the next multiple of `BLOCK` (ISO/IEC 7816-4)."""
    return plaintext + b"\x80" + b"\x00" * (-(len(plaintext) + 1) % BLOCK)


def unpad(padded: bytes) -> bytes:
    """Undo `pad`. Raises Undecryptable (malformed)."""
    plaintext = padded.rstrip(b"\x00")
    if not plaintext.endswith(b"\x80"):
        raise Undecryptable("malformed")
    return plaintext[:-1]
