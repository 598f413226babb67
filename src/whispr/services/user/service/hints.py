"""Telling other processes that what they remember of a person is out of date."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal
from uuid import UUID

import msgspec

from whispr.kit.errors import Unavailable
from whispr.kit.telemetry import get_logger

log = get_logger(__name__)

CHANNEL = "cache:invalidate:messaging"


class Hints:
    """Hints are sent after the commit and may be lost: whoever caches also forgets after a while."""

    def __init__(self, publish: Callable[[str, bytes], Awaitable[None]]) -> None:
        self._publish = publish

    async def changed(self, kind: Literal["relations", "profile"], *user_ids: UUID) -> None:
        """Say that `kind` of each person changed. Never fails: the change itself is already committed."""
        try:
            for user_id in user_ids:
                await self._publish(CHANNEL, msgspec.json.encode({"kind": kind, "user_id": user_id}))
        except Unavailable as failure:
            log.warning("hint_lost", kind=kind, code=failure.code)
