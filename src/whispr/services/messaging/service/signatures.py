"""Ed25519 checks, many at a time, in processes of their own.

A check takes some 50 µs, as much as everything else a message costs this process. Threads do not help: libsodium lets go of
the interpreter's lock for each check, and getting it back from a busy loop costs as much again. So batches go through a
pipe to `signature_helper`, and come back as one byte for each check.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Final

from whispr.kit.telemetry import get_logger
from whispr.services.messaging.service import signature_helper
from whispr.services.messaging.service.signature_helper import COUNT, RECORD, is_signed

log = get_logger(__name__)

Claim = tuple[bytes, bytes, bytes]
"""Public key (32 bytes), what was signed (32 bytes), signature (64 bytes)."""

# Below this the way through the pipe is longer than the work.
_WORTH_SENDING: Final = 8

# Checks between two turns of the event loop, where it does them itself: below a millisecond.
_SLICE: Final = 16

_TIMEOUT: Final = 5.0
_START_TIMEOUT: Final = 20.0
_RETRY_SECONDS: Final = 1.0

_NO_CLAIM: Final = (bytes(32), bytes(32), bytes(64))
"""Its answer shows that a helper is there."""


class SignatureChecker:
    """Verifies batches in `processes` helpers; 0 does it on the event loop, and so does a helper that is not there.

    Helpers are started by the first batch that is worth it, and again when one has ended.
    """

    def __init__(self, processes: int) -> None:
        self._helpers = [_Helper() for _ in range(processes)]

    async def check(self, claims: Sequence[Claim]) -> list[bool]:
        """For each claim whether its signature is right."""
        if not self._helpers or len(claims) < _WORTH_SENDING:
            return await _check_in_slices(claims)
        share = -(-len(claims) // len(self._helpers))
        parts = [claims[start : start + share] for start in range(0, len(claims), share)]
        answers = await asyncio.gather(
            *(helper.check(part) for helper, part in zip(self._helpers, parts, strict=False))
        )
        return [answer for part in answers for answer in part]

    async def start(self) -> None:
        """Start the helpers that are not there, and wait for them."""
        await asyncio.gather(*(helper.start() for helper in self._helpers))

    async def close(self) -> None:
        """End the helpers."""
        for helper in self._helpers:
            await helper.close()


class _Helper:
    """One process. It ends by itself when its pipe is closed, however this process dies."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._starting: asyncio.Task[None] | None = None
        self._start_at = 0.0
        self._lock = asyncio.Lock()

    async def check(self, claims: Sequence[Claim]) -> list[bool]:
        if any(
            len(key) != 32 or len(signed) != 32 or len(signature) != 64 for key, signed, signature in claims
        ):
            return await _check_in_slices(claims)
        async with self._lock:
            process = self._process
            if process is None:
                # A start takes longer than a message may wait, more so where several workers begin at once.
                self._start_soon()
                return await _check_in_slices(claims)
            try:
                async with asyncio.timeout(_TIMEOUT):
                    answer = await _ask(process, claims)
            except (OSError, EOFError, TimeoutError) as error:
                log.warning("signature_helper_lost", error=type(error).__name__)
                await self._end(process)
                return await _check_in_slices(claims)
            except asyncio.CancelledError:
                # Its answer would be taken for that to the next question.
                await self._end(process)
                raise
        return [flag == 1 for flag in answer]

    async def start(self) -> None:
        self._start_soon()
        if self._starting is not None:
            await self._starting

    async def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        async with self._lock:
            if self._process is not None:
                await self._end(self._process)

    def _start_soon(self) -> None:
        if self._process is None and self._starting is None and time.monotonic() >= self._start_at:
            self._starting = asyncio.get_running_loop().create_task(self._start())

    async def _start(self) -> None:
        # One that cannot be started is not tried again with every batch.
        self._start_at = time.monotonic() + _RETRY_SECONDS
        process: asyncio.subprocess.Process | None = None
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    signature_helper.__name__,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                )
                await _ask(process, [_NO_CLAIM])
            self._process, process = process, None
        except (OSError, EOFError, TimeoutError) as error:
            log.warning("signature_helper_not_started", error=type(error).__name__)
        finally:
            self._starting = None
            if process is not None:
                await _kill(process)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        self._process = None
        await _kill(process)


async def _ask(process: asyncio.subprocess.Process, claims: Sequence[Claim]) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(COUNT.pack(len(claims)) + b"".join(RECORD.pack(*claim) for claim in claims))
    await process.stdin.drain()
    return await process.stdout.readexactly(len(claims))


async def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _check_in_slices(claims: Sequence[Claim]) -> list[bool]:
    answers: list[bool] = []
    for start in range(0, len(claims), _SLICE):
        if start:
            await asyncio.sleep(0)
        answers += [is_signed(*claim) for claim in claims[start : start + _SLICE]]
    return answers
