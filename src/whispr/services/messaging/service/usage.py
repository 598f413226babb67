"""What can be said of messaging's use without saying anything about anyone."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, time
from typing import Any

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.errors import Invalid
from whispr.services.messaging.store import usage as store


class InvalidPeriod(Invalid):
    """The period ends before it begins."""

    code = "invalid_period"


class Usage:
    """`threshold`: a number about fewer people than that is null, zero included."""

    def __init__(self, db: Database, clock: Clock, *, threshold: int) -> None:
        self._db = db
        self._clock = clock
        self._threshold = threshold

    async def report(self, start: datetime, end: datetime) -> dict[str, Any]:
        """Aggregates of the whole days (UTC) from `start` to before `end`. Raises `InvalidPeriod`.

        Days are whole and small numbers left out, because two reports that differ by one would tell of that one.
        """
        start, end = _midnight(start), _midnight(end)
        if start >= end:
            raise InvalidPeriod
        async with self._db.connection() as connection:
            sent = await store.messages_sent(connection, start, end)
            made = await store.conversations_made(connection, start, end)
            scheduled = await store.messages_scheduled(connection, start, end)
            reported = await store.messages_reported(connection, start, end)
        return {
            "from": start.isoformat(),
            "until": end.isoformat(),
            "generated_at": self._clock.now().isoformat(),
            "threshold": self._threshold,
            # No sum of the types beside them: what one of them hides could be told from it.
            "messages": self._large_enough(
                [*sent, scheduled, reported],
                ("text", "media", "system", "edited", "erased", "scheduled", "reported"),
            ),
            "conversations": self._large_enough(made, ("direct", "group")),
        }

    def _large_enough(self, counts: Iterable[store.Count], names: Iterable[str]) -> dict[str, int | None]:
        known = {item.name: item.count for item in counts if item.people >= self._threshold}
        return {name: known.get(name) for name in names}


def _midnight(moment: datetime) -> datetime:
    return datetime.combine(moment.astimezone(UTC).date(), time(), UTC)
