"""How long messages are kept: what is older than a conversation, or this server, keeps is deleted with its place in the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Final
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.errors import Failure
from whispr.kit.telemetry import get_logger, metrics
from whispr.services.messaging.models import CommittedEvent
from whispr.services.messaging.store import expiry as store

log = get_logger(__name__)

_LOOKED_AT_ONCE: Final = 1_000
_ENTRIES_AT_ONCE: Final = 2_000
_FIRST: Final = UUID(int=0)

_entries_purged = metrics.counter("entries_purged", "Messages and events deleted by retention.")


class Retention:
    """Purges conversation by conversation, each batch with its `history_purged` in one transaction.

    `longest` is this server's own limit, None for none; a conversation's own limit counts where it is shorter. Safe to run
    on several nodes at once: whoever comes second finds nothing left.
    """

    def __init__(
        self,
        db: Database,
        clock: Clock,
        publish: Callable[[Sequence[CommittedEvent]], None],
        on_doubt: Callable[[], None],
        wake_outbox: Callable[[], None],
        *,
        longest: Callable[[], timedelta | None],
    ) -> None:
        self._db = db
        self._clock = clock
        self._publish = publish
        self._on_doubt = on_doubt
        self._wake_outbox = wake_outbox
        self._longest = longest

    async def purge_outdated(self, *, until: Callable[[], bool] = lambda: False) -> int:
        """Delete everything that is too old; how many messages and events went. `until` ends it sooner."""
        purged = 0
        after: UUID | None = _FIRST
        while after is not None and not until():
            async with self._db.connection() as connection:
                found = await store.outdated_conversations(
                    connection, after, self._clock.now(), self._longest(), _LOOKED_AT_ONCE
                )
            for conversation_id in found.conversation_ids:
                purged += await self._purge_whole(conversation_id, until)
            after = found.last
        if purged:
            self._wake_outbox()
            _entries_purged.inc(purged)
            log.info("history_purged", entries=purged)
        return purged

    async def _purge_whole(self, conversation_id: UUID, until: Callable[[], bool]) -> int:
        purged = 0
        try:
            while not until() and (gone := await self._purge(conversation_id)):
                purged += gone
        except Failure:
            self._on_doubt()
            raise
        except Exception:
            # One conversation that cannot be served must not keep all the others' messages alive.
            log.exception("purge_failed")
        return purged

    async def _purge(self, conversation_id: UUID) -> int:
        now = self._clock.now()
        async with self._db.transaction() as tx:
            held = await store.hold(tx, conversation_id, wait=True)
            kept = self._kept(held) if held is not None else None
            if held is None or kept is None:
                return 0
            stretch = await store.outdated_stretch(tx, held, now - kept, _ENTRIES_AT_ONCE)
            if not stretch.worthwhile:
                return 0
            gone = await store.purge(tx, held, stretch.until_seq)
            events = await store.append_silently(
                tx, held, [("history_purged", {"until_seq": stretch.until_seq})], now
            )
        self._publish(events)
        return gone

    def _kept(self, held: store.Held) -> timedelta | None:
        limits = [limit for limit in (self._longest(),) if limit is not None]
        if held.retention_seconds is not None:
            limits.append(timedelta(seconds=held.retention_seconds))
        return min(limits, default=None)
