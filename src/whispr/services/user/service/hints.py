"""Telling other processes that what they remember of a person is out of date."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Literal
from uuid import UUID

import msgspec

from whispr.kit.errors import Unavailable
from whispr.kit.telemetry import get_logger

log = get_logger(__name__)

CHANNEL = "cache:invalidate:messaging"

Kind = Literal["relations", "profile"]

_RETRY_SECONDS: Final = 1.0


class Hints:
    """Hints are sent after the commit. One that cannot be sent is sent later by `run()`, the supervised loop.

    It may still be lost with this process, so whoever caches also forgets after a while.
    """

    MAX_UNSENT: Final = 100_000

    def __init__(self, publish: Callable[[str, bytes], Awaitable[None]]) -> None:
        self._publish = publish
        self._unsent: dict[tuple[Kind, UUID], None] = {}
        self._has_unsent = asyncio.Event()

    async def changed(self, kind: Kind, *user_ids: UUID) -> None:
        """Say that `kind` of each person changed. Never fails: the change itself is already committed."""
        for number, user_id in enumerate(user_ids):
            try:
                await self._send(kind, user_id)
            except Unavailable as failure:
                log.warning("hint_delayed", kind=kind, code=failure.code)
                self._keep(kind, user_ids[number:])
                return

    async def run(self) -> None:
        """Send what could not be sent, for ever."""
        while True:
            await self._has_unsent.wait()
            kind, user_id = next(iter(self._unsent))
            # Before it is sent: the same may have to be said again meanwhile.
            del self._unsent[kind, user_id]
            if not self._unsent:
                self._has_unsent.clear()
            try:
                await self._send(kind, user_id)
            except Unavailable:
                self._keep(kind, (user_id,))
                await asyncio.sleep(_RETRY_SECONDS)

    async def _send(self, kind: Kind, user_id: UUID) -> None:
        await self._publish(CHANNEL, msgspec.json.encode({"kind": kind, "user_id": user_id}))

    def _keep(self, kind: Kind, user_ids: tuple[UUID, ...]) -> None:
        # Away for that long, Valkey has lost everybody's subscription, and who missed hints knows it.
        room = self.MAX_UNSENT - len(self._unsent)
        self._unsent.update(dict.fromkeys((kind, user_id) for user_id in user_ids[:room]))
        self._has_unsent.set()
