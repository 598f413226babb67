"""Disappearing messages: when their seconds begin, and that nothing is left of them when they are over.

Every node does this for all of them. A conversation that another node has in hand is left to it, unless its messages are
late already; under the conversation's lock each looks again, so that a message is erased once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from msgspec import UNSET

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.errors import Failure
from whispr.kit.telemetry import get_logger, metrics
from whispr.services.messaging.models import CommittedEvent, MessageHead, Watermark
from whispr.services.messaging.store import changes
from whispr.services.messaging.store import expiry as store

log = get_logger(__name__)

# Other nodes' messages are found no later than this; our own wake the loop.
IDLE_SECONDS: Final = 10.0
GATHER_SECONDS: Final = 0.2
PATIENCE: Final = timedelta(seconds=1)
SWEEP_SECONDS: Final = 600.0

_DUE_AT_ONCE: Final = 500
_CONVERSATIONS_AT_ONCE: Final = 100
_FIRST: Final = UUID(int=0)

_messages_expired = metrics.counter("messages_expired", "Messages erased because their time was over.")
_overdue_seconds = metrics.gauge(
    "messages_overdue_seconds", "By how much the next message to be erased is late already."
)


class Expiry:
    """`run()` is the supervised loop.

    `publish` delivers committed events; `on_doubt` is called when nobody knows whether there are some; `wake_outbox` sends
    what was written for media.
    """

    def __init__(
        self,
        db: Database,
        clock: Clock,
        publish: Callable[[Sequence[CommittedEvent]], None],
        on_doubt: Callable[[], None],
        wake_outbox: Callable[[], None],
    ) -> None:
        self._db = db
        self._clock = clock
        self._publish = publish
        self._on_doubt = on_doubt
        self._wake_outbox = wake_outbox
        self._next: datetime | None = None
        self._unsettled: set[UUID] = set()
        self._swept_at = float("-inf")
        self._woken = asyncio.Event()

    def expects(self, head: MessageHead) -> None:
        """A message was stored that will expire. Called on the way of sending: it only takes note."""
        if head.expires_at is UNSET:
            self.reconsider(head.conversation_id)
        elif self._next is None or head.expires_at < self._next:
            self._next = head.expires_at
            self._woken.set()

    def reconsider(self, conversation_id: UUID) -> None:
        """Somebody left the conversation, or something else that messages may have waited for."""
        self._unsettled.add(conversation_id)
        self._woken.set()

    def readers_moved(self, moved: Iterable[Watermark]) -> None:
        """People have read on."""
        for watermark in moved:
            if watermark.read_seq > watermark.previous_read_seq:
                self.reconsider(watermark.conversation_id)

    async def run(self) -> None:
        """Begin seconds and erase what is due, for ever."""
        loop = asyncio.get_running_loop()
        look_at = float("-inf")
        while True:
            self._woken.clear()
            try:
                if loop.time() >= self._swept_at + SWEEP_SECONDS:
                    # What a crash left between a reading and the beginning of the seconds.
                    await self.sweep()
                    self._swept_at = look_at = loop.time()
                # Readings wake the loop all the time; where nothing disappears they cost one look.
                if await self.begin_seconds() or self._is_due() or loop.time() >= look_at:
                    await self.erase_due()
                    await self._find_next()
                    look_at = loop.time() + IDLE_SECONDS
            except Failure as failure:
                log.warning("expiry_postponed", code=failure.code)
                self._next = self._clock.now()
            await asyncio.sleep(GATHER_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), self._seconds_left())

    async def _find_next(self) -> None:
        self._next = None
        async with self._db.connection() as connection:
            found = await store.next_due(connection)
        # A message that was stored meanwhile has put itself down, and the query may not have seen it.
        self._next = min((due for due in (found, self._next) if due is not None), default=None)
        _overdue_seconds.set(max(0.0, (self._clock.now() - found).total_seconds()) if found else 0.0)

    def _is_due(self) -> bool:
        return self._next is not None and self._next <= self._clock.now()

    def _seconds_left(self) -> float:
        if self._next is None:
            return IDLE_SECONDS
        return min(IDLE_SECONDS, max(0.0, (self._next - self._clock.now()).total_seconds()))

    async def begin_seconds(self) -> int:
        """Look at the conversations that somebody read or left; of how many messages the seconds began."""
        if not self._unsettled:
            return 0
        unsettled, self._unsettled = self._unsettled, set()
        try:
            async with self._db.connection() as connection:
                # Nearly always there is none, and then nobody's reading costs more than this.
                if not await store.any_awaits_readers(connection):
                    return 0
                ids = list(unsettled)
                begun = 0
                for at in range(0, len(ids), _CONVERSATIONS_AT_ONCE):
                    some = ids[at : at + _CONVERSATIONS_AT_ONCE]
                    begun += await store.start_seconds(connection, some, self._clock.now())
                return begun
        except Exception:
            self._unsettled |= unsettled
            raise

    async def sweep(self) -> int:
        """`begin_seconds` for every conversation where messages wait for readers."""
        begun, after = 0, _FIRST
        while True:
            async with self._db.connection() as connection:
                ids = await store.awaiting_readers(connection, after, _CONVERSATIONS_AT_ONCE)
                if ids:
                    begun += await store.start_seconds(connection, ids, self._clock.now())
            if len(ids) < _CONVERSATIONS_AT_ONCE:
                return begun
            after = ids[-1]

    async def erase_due(self, *, until: Callable[[], bool] = lambda: False) -> int:
        """Erase every message whose time is over; how many. `until` ends it sooner."""
        erased = 0
        while not until():
            async with self._db.connection() as connection:
                due = await store.due_conversations(connection, self._clock.now(), _DUE_AT_ONCE)
            in_this_round = 0
            for conversation_id, since in due.items():
                in_this_round += await self._erase_in(conversation_id, since)
            if in_this_round == 0:
                break
            erased += in_this_round
        if erased:
            self._wake_outbox()
            _messages_expired.inc(erased)
            log.info("messages_expired", messages=erased)
        return erased

    async def _erase_in(self, conversation_id: UUID, since: datetime) -> int:
        try:
            return await self._erase(conversation_id, wait=since < self._clock.now() - PATIENCE)
        except Failure:
            self._on_doubt()
            raise
        except Exception:
            # One conversation that cannot be served must not keep all the others' messages alive.
            log.exception("expiry_failed")
            return 0

    async def _erase(self, conversation_id: UUID, *, wait: bool) -> int:
        now = self._clock.now()
        async with self._db.transaction() as tx:
            held = await store.hold(tx, conversation_id, wait=wait)
            if held is None:
                return 0
            due = await store.due_messages(tx, conversation_id, now, _DUE_AT_ONCE)
            erased = await changes.tombstone(tx, conversation_id, due) if due else []
            if not erased:
                return 0
            events = await store.append_silently(
                tx,
                held,
                [
                    (
                        "message_deleted",
                        {"message_id": message_id, "deleted_by": None, "reason": "expired"},
                    )
                    for message_id in erased
                ],
                now,
            )
        self._publish(events)
        return len(erased)
