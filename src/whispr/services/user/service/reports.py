"""Activity reports and the cleanup of long-absent people."""

from __future__ import annotations

from datetime import UTC, datetime, time
from typing import Any
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.services.user import store
from whispr.services.user.models import InvalidPeriod, OperationConflict
from whispr.services.user.service.hints import Hints
from whispr.services.user.settings import UserSettings

CLEANUP_LIMIT = 1000


class Reports:
    """What can be said about everybody without saying anything about anyone."""

    def __init__(self, database: Database, hints: Hints, clock: Clock, settings: UserSettings) -> None:
        self._database = database
        self._hints = hints
        self._clock = clock
        self._settings = settings

    async def activity(self, start: datetime, end: datetime) -> dict[str, Any]:
        """Aggregates of the whole days (UTC) from `start` to before `end`. Raises InvalidPeriod.

        A number about fewer people than the threshold is null, zero included: two reports whose numbers differ by
        one would tell of that one.
        """
        start, end = _midnight(start), _midnight(end)
        if start >= end:
            raise InvalidPeriod
        async with self._database.connection() as conn:
            profiles = await store.count_profiles(conn, start, end)
            relations = await store.count_relations(conn)
            storage = await store.sum_storage(conn)
            locales = await store.count_locales(conn)
        return {
            "from": start.isoformat(),
            "until": end.isoformat(),
            "generated_at": self._clock.now().isoformat(),
            "threshold": self._settings.report_threshold,
            "profiles": {name: self._enough(count, count) for name, count in profiles.items()},
            "relations": {name: self._enough(count, people) for name, (count, people) in relations.items()},
            "storage": {
                "people": self._enough(storage["people"], storage["people"]),
                "used_bytes": self._enough(storage["used_bytes"], storage["people"]),
            },
            "locales": folded(dict(locales), self._settings.report_threshold),
        }

    async def cleanup_inactive(
        self, operation_id: UUID, inactive_since: datetime, *, dry_run: bool, limit: int
    ) -> int:
        """Put people to rest who have not been there since then; how many were, or with `dry_run` would be.

        Names, pictures and contact lists go; privacy and blocks stay, and the person returns by coming back. The
        account itself belongs to `auth`. At most `limit` people (1,000 where 0), the longest absent first.
        """
        limit = min(limit, CLEANUP_LIMIT) if limit > 0 else CLEANUP_LIMIT
        now = self._clock.now()
        request = {"inactive_since": inactive_since.isoformat(), "dry_run": dry_run, "limit": limit}
        async with self._database.transaction() as tx:
            if not await store.begin_operation(tx, operation_id, request, now):
                done = await store.operation(tx, operation_id)
                if done is None or done[0] != request:
                    raise OperationConflict
                return int(done[1]["affected"])
            user_ids = await store.inactive_ids(tx, inactive_since, limit)
            if not dry_run:
                await store.put_to_rest(tx, user_ids, now)
            await store.finish_operation(tx, operation_id, {"affected": len(user_ids)})
        if not dry_run:
            await self._hints.changed("profile", *user_ids)
            await self._hints.changed("relations", *user_ids)
        return len(user_ids)

    def _enough(self, value: int, people: int) -> int | None:
        return value if people >= self._settings.report_threshold else None


def folded(groups: dict[str, int], threshold: int) -> dict[str, int]:
    """Groups of fewer than `threshold` people, summed as "other".

    Where "other" itself stays below the threshold, the next smallest group joins it: otherwise the total less the
    groups shown would give the small number away.
    """
    shown = dict(sorted(groups.items(), key=lambda item: (-item[1], item[0])))
    other = sum(shown.pop(name) for name in [name for name, count in shown.items() if count < threshold])
    while shown and 0 < other < threshold:
        other += shown.popitem()[1]
    if other >= threshold:
        shown["other"] = other
    return shown


def _midnight(moment: datetime) -> datetime:
    return datetime.combine(moment.astimezone(UTC).date(), time(), UTC)
