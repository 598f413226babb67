"""Ed25519 checks, many at a time, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import nacl.bindings
from nacl.exceptions import BadSignatureError

Claim = tuple[bytes, bytes, bytes]
"""Public key (32 bytes), what was signed, signature (64 bytes)."""

# Handing work to a thread and back costs about as much as this many checks (some 50 µs each).
_INLINE: Final = 2


class SignatureChecker:
    """Verifies batches in a small thread pool; libsodium releases the interpreter's lock while it works."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="signatures")

    async def check(self, claims: Sequence[Claim]) -> list[bool]:
        """For each claim whether its signature is right."""
        if len(claims) <= _INLINE:
            return _check(claims)
        loop = asyncio.get_running_loop()
        share = -(-len(claims) // self._threads)
        parts = [claims[start : start + share] for start in range(0, len(claims), share)]
        answers = await asyncio.gather(*(loop.run_in_executor(self._pool, _check, part) for part in parts))
        return [answer for part in answers for answer in part]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _check(claims: Sequence[Claim]) -> list[bool]:
    return [_is_signed(*claim) for claim in claims]


def _is_signed(key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        nacl.bindings.crypto_sign_open(signature + message, key)
    except (BadSignatureError, ValueError):
        return False
    return True
