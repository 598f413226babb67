"""Passwords: argon2id in threads of its own, with a bounded queue in front."""

from __future__ import annotations

import asyncio
import secrets
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError

from whispr.services.auth.models import Busy
from whispr.services.auth.settings import AuthSettings

T = TypeVar("T")


class Passwords:
    """Hashes and checks. Raises `Busy` rather than let people wait behind a queue nobody gets through."""

    def __init__(self, settings: AuthSettings) -> None:
        self._hasher = PasswordHasher(
            time_cost=settings.argon2_time_cost,
            memory_cost=settings.argon2_memory_kib,
            parallelism=settings.argon2_parallelism,
            type=Type.ID,
        )
        self._threads = ThreadPoolExecutor(settings.hashing_threads, thread_name_prefix="argon2")
        self._most_waiting = settings.hashing_threads + settings.hashing_queue
        self._waiting = 0
        # Checked in place of the hash of someone who does not exist, so that the answer takes as long.
        self._nobody = self._hasher.hash(secrets.token_urlsafe(32))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def hash(self, password: str) -> str:
        """The argon2id hash of `password` with its parameters and a new salt."""
        return await self._run(lambda: self._hasher.hash(_bytes(password)))

    async def verify(self, password_hash: str | None, password: str) -> bool:
        """Does `password` belong to this hash? None is the hash of nobody and takes as long to deny."""
        matches = await self._run(lambda: self._matches(password_hash or self._nobody, password))
        return matches and password_hash is not None

    def outdated(self, password_hash: str) -> bool:
        """Was this hash made with other parameters than today's?"""
        return self._hasher.check_needs_rehash(password_hash)

    def _matches(self, password_hash: str, password: str) -> bool:
        try:
            return self._hasher.verify(password_hash, _bytes(password))
        except (VerificationError, InvalidHashError):
            return False

    async def _run(self, work: Callable[[], T]) -> T:
        if self._waiting >= self._most_waiting:
            raise Busy(retry_after=1)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1


def _bytes(password: str) -> bytes:
    # The same password typed on another keyboard may arrive composed otherwise.
    return unicodedata.normalize("NFKC", password).encode()
