"""Who has written to too many people, and may for a while write only to those who know them.

PostgreSQL keeps the restrictions; every node has all of them in memory, for the hot path asks with each message.
"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import msgspec

from whispr.kit import outbox
from whispr.kit.cache import Cache
from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.errors import Failure
from whispr.kit.ids import uuid7
from whispr.kit.telemetry import get_logger, metrics
from whispr.services.messaging.models.abuse import Restricted, Restriction, RestrictionNotFound
from whispr.services.messaging.service.structure import Bus
from whispr.services.messaging.store import restrictions as store

log = get_logger(__name__)

INCIDENT: Final = "incident"
"""Topic of the outbox rows that tell moderation of abnormal behaviour."""

HINTS: Final = "messaging:restrictions"
RELOAD_SECONDS: Final = 15.0

ANSWER_WITHIN: Final = 1_000
"""Whoever wrote one of so many newest messages of a direct conversation can be answered."""

_restrictions_imposed = metrics.counter("restrictions_imposed", "People restricted.", ("reason",))
_people_restricted = metrics.gauge("people_restricted", "People who are restricted now.")


class Restrictions:
    """The restrictions in force. `run()` is the supervised loop that learns of other nodes' changes."""

    def __init__(self, db: Database, cache: Cache, clock: Clock, bus: Bus) -> None:
        self._db = db
        self._cache = cache
        self._clock = clock
        self._bus = bus
        self._until: dict[int, datetime] = {}
        self._answerable: dict[tuple[UUID, UUID], bool] = {}
        self._reload_now = asyncio.Event()

    def start(self) -> None:
        """Listen for other nodes' changes."""
        self._cache.subscribe(HINTS, lambda _: self._reload_now.set())
        self._cache.on_reconnect(self._reload_now.set)

    def refusal(self, user_id: UUID) -> Restricted | None:
        """What a restricted person is answered, None for all others. Sync: the hot path."""
        if not self._until:
            return None
        until = self._until.get(user_id.int)
        if until is None:
            return None
        left = (until - self._clock.now()).total_seconds()
        if left <= 0:
            return None
        return Restricted(retry_after=max(1.0, round(left)), until=msgspec.to_builtins(until))

    def may_answer(self, conversation_id: UUID, user_id: UUID) -> bool:
        """Whether the other one in a direct conversation has written to the person. Raises KeyError if not at hand."""
        return self._answerable[conversation_id, user_id]

    async def load_answer(self, conversation_id: UUID, user_id: UUID) -> None:
        """Make what `may_answer` answers present."""
        async with self._db.connection() as connection:
            self._answerable[conversation_id, user_id] = await store.others_wrote(
                connection, conversation_id, user_id, ANSWER_WITHIN
            )

    async def impose(self, user_id: UUID, reason: str, duration: timedelta, details: dict[str, Any]) -> bool:
        """Restrict a person, and tell moderation; False if they are restricted already."""
        now = self._clock.now()
        restriction = Restriction(user_id, reason, now + duration, now)
        incident = {
            "incident_id": str(uuid7()),
            "kind": "abnormal_volume",
            "reason": reason,
            "user_id": str(user_id),
            "at": msgspec.to_builtins(now),
            "until": msgspec.to_builtins(restriction.until),
            **details,
        }
        async with self._db.transaction() as tx:
            is_new = await store.impose(tx, restriction)
            if is_new:
                await outbox.add(tx, INCIDENT, incident["incident_id"], incident)
        if is_new:
            self._until[user_id.int] = restriction.until
            _restrictions_imposed.labels(reason=reason).inc()
            log.warning("sender_restricted", user_id=str(user_id), reason=reason, **details)
            self._bus.notice([user_id], "restricted", {"reason": reason, "until": restriction.until})
            await self._tell()
        return is_new

    async def lift(self, user_id: UUID) -> None:
        """End a restriction. Raises `RestrictionNotFound`."""
        async with self._db.transaction() as tx:
            was_restricted = await store.lift(tx, user_id, self._clock.now())
        self._until.pop(user_id.int, None)
        if not was_restricted:
            raise RestrictionNotFound
        log.info("restriction_lifted", user_id=str(user_id))
        self._bus.notice([user_id], "restriction_lifted", {})
        await self._tell()

    async def list_page(self, after: UUID, limit: int) -> tuple[list[Restriction], UUID | None]:
        """Restrictions in force by the people's ids, from `after`, and where the next page begins."""
        async with self._db.connection() as connection:
            found = await store.list_page(connection, self._clock.now(), after, limit + 1)
        page = found[:limit]
        return page, page[-1].user_id if len(found) > limit else None

    async def run(self) -> None:
        """Learn of changes, for ever."""
        while True:
            self._reload_now.clear()
            try:
                await self.reload()
            except Failure as failure:
                log.warning("restrictions_unknown", code=failure.code)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RELOAD_SECONDS):
                    await self._reload_now.wait()

    async def reload(self) -> None:
        """Read all restrictions in force, and drop those that are over."""
        now = self._clock.now()
        async with self._db.connection() as connection:
            await store.forget_ended(connection, now)
            found = await store.active(connection, now)
        self._until = {restriction.user_id.int: restriction.until for restriction in found}
        # The others may have answered meanwhile.
        self._answerable = {}
        _people_restricted.set(len(self._until))

    async def _tell(self) -> None:
        try:
            await self._cache.publish(HINTS, b"")
        except Failure as failure:
            log.warning("restriction_hint_lost", code=failure.code)
