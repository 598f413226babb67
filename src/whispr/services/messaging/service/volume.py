"""Finding out who sends abnormally much, without making anybody wait.

Each node counts in memory and adds its counts to Valkey every second; whoever is above a threshold over all nodes is
restricted. While Valkey is away a node goes by what it saw itself.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Final
from uuid import UUID

import msgspec

from whispr.kit.cache import LOST_CACHE, Cache
from whispr.kit.clock import Clock
from whispr.kit.errors import Failure
from whispr.kit.telemetry import get_logger, metrics
from whispr.services.messaging.service.restrictions import Restrictions

log = get_logger(__name__)

FOLD_SECONDS: Final = 1.0

STRANGERS_A_UNIT: Final = 50
"""A group made with so many people who do not know its maker counts as one approach more."""

_MAX_PEOPLE: Final = 50_000


class Threshold(msgspec.Struct, frozen=True):
    """More than `limit` within a window of `seconds` is abnormal; 0 looks away. Windows begin at multiples of their length."""

    name: str
    seconds: int
    limit: int


class _Measured:
    """One thing that is counted, by person."""

    def __init__(self, thresholds: list[Threshold]) -> None:
        self.thresholds = [threshold for threshold in thresholds if threshold.limit > 0]
        # Whoever stays below a twentieth of every threshold on each node need not be heard of.
        self.worth_telling = max(1, min((item.limit for item in self.thresholds), default=1) // 20)
        self.counts: dict[int, int] = {}

    def add(self, user_id: UUID, count: int) -> None:
        key = user_id.int
        self.counts[key] = self.counts.get(key, 0) + count

    def take(self) -> dict[int, int]:
        """What is worth telling; the rest goes on counting."""
        told = {key: count for key, count in self.counts.items() if count >= self.worth_telling}
        for key in told:
            del self.counts[key]
        if len(self.counts) > _MAX_PEOPLE:
            self.counts.clear()
        return told


class Approaches:
    """What becoming known to strangers costs: nothing, but it is counted, and refused to who is restricted."""

    def __init__(self, restrictions: Restrictions, volume: Volume | None) -> None:
        self._restrictions = restrictions
        self._volume = volume

    def meet(self, user_id: UUID, strangers: int) -> None:
        """The person wants to begin a conversation with, or add to a group, people who do not know them.

        Raises `Restricted`.
        """
        refusal = self._restrictions.refusal(user_id)
        if refusal is not None:
            raise refusal
        if self._volume is not None:
            self._volume.count_approach(user_id, strangers)


class Volume:
    """Counts messages, and approaches to people who do not know the sender. `run()` is its supervised loop."""

    def __init__(
        self,
        cache: Cache,
        clock: Clock,
        restrictions: Restrictions,
        *,
        messages_per_minute: int,
        messages_per_hour: int,
        approaches_per_minute: int,
        approaches_per_hour: int,
        restriction: timedelta,
    ) -> None:
        self._cache = cache
        self._clock = clock
        self._restrictions = restrictions
        self._restriction = restriction
        self._messages = _Measured(
            [
                Threshold("messages_per_minute", 60, messages_per_minute),
                Threshold("messages_per_hour", 3_600, messages_per_hour),
            ]
        )
        self._approaches = _Measured(
            [
                Threshold("approaches_per_minute", 60, approaches_per_minute),
                Threshold("approaches_per_hour", 3_600, approaches_per_hour),
            ]
        )
        self._seen_alone: Counter[str] = Counter()

    def count_message(self, user_id: UUID) -> None:
        """The person sends a message. Sync: the hot path."""
        counts, key = self._messages.counts, user_id.int
        counts[key] = counts.get(key, 0) + 1

    def count_approach(self, user_id: UUID, strangers: int) -> None:
        """The person begins a conversation with, or adds to a group, so many people who do not know them."""
        self._approaches.add(user_id, 1 + strangers // STRANGERS_A_UNIT)

    async def lift(self, user_id: UUID) -> None:
        """End a restriction, and begin to count anew: it would be back at once otherwise. Raises `RestrictionNotFound`."""
        await self._restrictions.lift(user_id)
        names = [
            self._name(threshold, user_id.int)
            for measured in (self._messages, self._approaches)
            for threshold in measured.thresholds
        ]
        for name in names:
            del self._seen_alone[name]
        try:
            await self._cache.client.delete(*names)
        except LOST_CACHE:
            metrics.cache_failures.inc()

    async def run(self) -> None:
        """Add up and act, for ever."""
        while True:
            await asyncio.sleep(FOLD_SECONDS)
            try:
                await self.fold()
            except Failure as failure:
                log.warning("volume_not_judged", code=failure.code)

    async def fold(self) -> None:
        """Add what was counted here to what all nodes counted, and restrict whoever is above a threshold."""
        for measured in (self._messages, self._approaches):
            told = measured.take()
            if told and measured.thresholds:
                await self._judge(measured.thresholds, told)

    async def _judge(self, thresholds: list[Threshold], told: Mapping[int, int]) -> None:
        totals = await self._add(thresholds, told)
        restricted: set[int] = set()
        for (threshold, key), total in totals.items():
            if total > threshold.limit and key not in restricted:
                restricted.add(key)
                details = {"count": total, "limit": threshold.limit, "seconds": threshold.seconds}
                await self._restrictions.impose(UUID(int=key), threshold.name, self._restriction, details)

    async def _add(
        self, thresholds: list[Threshold], told: Mapping[int, int]
    ) -> dict[tuple[Threshold, int], int]:
        asked = [(threshold, key) for key in told for threshold in thresholds]
        try:
            async with self._cache.client.pipeline(transaction=False) as pipe:
                for threshold, key in asked:
                    name = self._name(threshold, key)
                    pipe.incrby(name, told[key])
                    pipe.expire(name, threshold.seconds)
                answers = await pipe.execute()
            self._seen_alone.clear()
            totals = [int(total) for total in answers[::2]]
        except LOST_CACHE:
            metrics.cache_failures.inc()
            for threshold, key in asked:
                self._seen_alone[self._name(threshold, key)] += told[key]
            totals = [self._seen_alone[self._name(threshold, key)] for threshold, key in asked]
        return dict(zip(asked, totals, strict=True))

    def _name(self, threshold: Threshold, key: int) -> str:
        window = int(self._clock.time() // threshold.seconds)
        return f"messaging:volume:{threshold.name}:{window}:{key:032x}"
