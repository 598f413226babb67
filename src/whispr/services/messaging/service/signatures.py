"""Ed25519 checks, many at a time."""

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

# Checks between two turns of the event loop, when it does them itself: below a millisecond.
_SLICE: Final = 16


class SignatureChecker:
    """Verifies batches: with `threads` 0 on the event loop in slices, else in a pool of so many threads.

    libsodium releases the interpreter's lock for each check, and taking it back from a busy loop costs about as much
    as the check. Threads pay where cores are idle, and cost a fifth of the throughput where they are not.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="signatures") if threads else None

    async def check(self, claims: Sequence[Claim]) -> list[bool]:
        """For each claim whether its signature is right."""
        if len(claims) <= _INLINE:
            return _check(claims)
        if self._pool is None:
            return await self._check_in_slices(claims)
        loop = asyncio.get_running_loop()
        share = -(-len(claims) // self._threads)
        parts = [claims[start : start + share] for start in range(0, len(claims), share)]
        answers = await asyncio.gather(*(loop.run_in_executor(self._pool, _check, part) for part in parts))
        return [answer for part in answers for answer in part]

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def _check_in_slices(self, claims: Sequence[Claim]) -> list[bool]:
        answers: list[bool] = []
        for start in range(0, len(claims), _SLICE):
            if start:
                await asyncio.sleep(0)
            answers += _check(claims[start : start + _SLICE])
        return answers


def _check(claims: Sequence[Claim]) -> list[bool]:
    return [_is_signed(*claim) for claim in claims]


def _is_signed(key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        nacl.bindings.crypto_sign_open(signature + message, key)
    except (BadSignatureError, ValueError):
        return False
    return True
