"""When people were last connected. Transient data: Valkey only, and gone if Valkey is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from whispr.kit.batching import Batcher
from whispr.kit.cache import LOST_CACHE, Cache
from whispr.kit.telemetry import get_logger

log = get_logger(__name__)

_KEPT: Final = timedelta(days=90)


class LastSeen:
    """Times by person, to the second."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._asking = Batcher(self._load)

    async def note(self, user_id: UUID, at: float) -> None:
        """The person's last device has gone at `at` (epoch seconds)."""
        try:
            await self._cache.client.set(_key(user_id), int(at), ex=_KEPT)
        except LOST_CACHE as error:
            log.warning("last_seen_lost", error=type(error).__name__)

    async def of(self, user_ids: Collection[UUID]) -> Mapping[UUID, datetime]:
        """Those that are known."""
        if not user_ids:
            return {}
        try:
            return await self._asking.ask(list(user_ids))
        except LOST_CACHE as error:
            log.warning("last_seen_unknown", error=type(error).__name__)
            return {}

    async def _load(self, asked: list[list[UUID]]) -> list[dict[UUID, datetime]]:
        ids = list({user_id for user_ids in asked for user_id in user_ids})
        values = await self._cache.client.mget([_key(user_id) for user_id in ids])
        known = {
            user_id: datetime.fromtimestamp(int(value), UTC)
            for user_id, value in zip(ids, values, strict=True)
            if value is not None
        }
        return [{user_id: known[user_id] for user_id in user_ids if user_id in known} for user_ids in asked]


def _key(user_id: UUID) -> str:
    return f"messaging:last_seen:{user_id}"
