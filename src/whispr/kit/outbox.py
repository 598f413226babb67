"""Effects on other services, as rows written in the same transaction as the change that causes them.

A row is sent at least once; the receiving end is idempotent by a key derived from the row. The dispatcher leases rows
instead of locking them, so that no transaction is open during a remote call and a dispatcher that dies only delays
its rows by the lease. Rows of a topic that has no handler (its neighbour does not run here) wait, until `ttl` if one
is given and the topic is not one of the `lasting` ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.kit.errors import Failure, Kind
from whispr.kit.telemetry import consumer_span, get_logger, inject, metrics

log = get_logger(__name__)

SCHEMA = """
CREATE TABLE outbox (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic text NOT NULL,
    key text NOT NULL,
    payload jsonb NOT NULL,
    trace jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- Due at once by any clock: the dispatcher compares with its own, which may stand behind the server's.
    due_at timestamptz NOT NULL DEFAULT '-infinity',
    attempts int NOT NULL DEFAULT 0,
    last_error text
);
CREATE INDEX outbox_due ON outbox (topic, due_at, id);
ALTER TABLE outbox SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
"""

DROP = "DROP TABLE outbox;"

LEASE = timedelta(seconds=30)
FIRST_RETRY = 0.5
LONGEST_RETRY = 60.0


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """One effect to bring about. `key` is stable over repeats: derive the receiver's idempotency key from it."""

    id: int
    topic: str
    key: str
    payload: dict[str, Any]
    created_at: datetime
    attempts: int
    trace: dict[str, str]


Handler = Callable[[list[OutboxRow]], Awaitable[None]]


async def add(tx: Connection, topic: str, key: str, payload: Mapping[str, Any]) -> None:
    """Write an effect in the caller's transaction; `Dispatcher.wake()` after the commit sends it without delay."""
    await tx.execute(
        "INSERT INTO outbox (topic, key, payload, trace) VALUES ($1, $2, $3, $4)",
        topic,
        key,
        dict(payload),
        inject({}) or None,
    )


async def _lease(connection: Connection, topics: Sequence[str], now: datetime, limit: int) -> list[OutboxRow]:
    # One topic a batch: a handler gets rows of its own topic only, and a failing one does not delay the others.
    rows = await connection.fetch(
        """
        WITH due AS (
            SELECT id FROM outbox
            WHERE topic = (
                SELECT topic FROM outbox WHERE topic = ANY($1) AND due_at <= $2 ORDER BY due_at, id LIMIT 1
            ) AND due_at <= $2
            ORDER BY due_at, id LIMIT $3 FOR UPDATE SKIP LOCKED
        )
        UPDATE outbox SET due_at = $4, attempts = attempts + 1
        FROM due WHERE outbox.id = due.id
        RETURNING outbox.id, topic, key, payload, created_at, attempts, trace
        """,
        list(topics),
        now,
        limit,
        now + LEASE,
    )
    leased = [
        OutboxRow(
            row["id"],
            row["topic"],
            row["key"],
            row["payload"],
            row["created_at"],
            row["attempts"],
            row["trace"] or {},
        )
        for row in rows
    ]
    leased.sort(key=lambda row: row.id)
    return leased


async def _delete(connection: Connection, ids: Sequence[int]) -> None:
    await connection.execute("DELETE FROM outbox WHERE id = ANY($1)", list(ids))


async def _postpone(connection: Connection, ids: Sequence[int], due_at: datetime, error: str) -> None:
    await connection.execute(
        "UPDATE outbox SET due_at = $2, last_error = $3 WHERE id = ANY($1)", list(ids), due_at, error[:500]
    )


async def _expire(connection: Connection, ttl: timedelta, limit: int, lasting: Collection[str]) -> list[str]:
    # By the clock that wrote `created_at`: one that stands ahead of it would throw rows away before their time.
    rows = await connection.fetch(
        """
        DELETE FROM outbox WHERE id IN (
            SELECT id FROM outbox WHERE created_at < now() - $1::interval AND topic <> ALL($3) ORDER BY id LIMIT $2
        )
        RETURNING topic
        """,
        ttl,
        limit,
        list(lasting),
    )
    return [row["topic"] for row in rows]


async def pending(connection: Connection) -> dict[str, tuple[int, datetime]]:
    """Per topic: rows waiting, and when the oldest was written."""
    rows = await connection.fetch(
        "SELECT topic, count(*) AS n, min(created_at) AS oldest FROM outbox GROUP BY topic"
    )
    return {row["topic"]: (row["n"], row["oldest"]) for row in rows}


class Dispatcher:
    """Sends outbox rows to their topics' handlers; `run()` is a supervised loop.

    A handler gets up to `batch` rows of one topic and either returns (all done) or raises (all tried again with
    backoff and jitter). A batch of several rows that the other side refuses as invalid is tried row by row; a single
    row so refused is dropped with an error in the log: no retry could ever succeed, and it would block its topic.
    """

    def __init__(
        self,
        db: Database,
        clock: Clock,
        handlers: Mapping[str, Handler],
        *,
        batch: int = 200,
        idle: float = 1.0,
        ttl: timedelta | None = None,
        lasting: Collection[str] = (),
    ) -> None:
        self._db = db
        self._clock = clock
        self._handlers = dict(handlers)
        self._batch = batch
        self._idle = idle
        self._ttl = ttl
        self._lasting = frozenset(lasting)
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Look for rows now. Call it after the commit that wrote some."""
        self._woken.set()

    async def run(self) -> None:
        """Send rows for ever."""
        housekeeping = 0.0
        loop = asyncio.get_running_loop()
        while True:
            self._woken.clear()
            try:
                sent = await self.drain_once()
                if loop.time() >= housekeeping:
                    housekeeping = loop.time() + 15
                    await self._housekeep()
            except Failure as error:
                log.warning("outbox_unavailable", code=error.code)
                sent = 0
            if sent == 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), self._idle)

    async def drain_once(self) -> int:
        """Handle one batch of due rows; the number of rows taken, done or not."""
        if not self._handlers:
            return 0
        async with self._db.connection() as connection:
            rows = await _lease(connection, list(self._handlers), self._clock.now(), self._batch)
        if rows:
            await self._handle(rows)
        return len(rows)

    async def _handle(self, rows: list[OutboxRow]) -> None:
        topic = rows[0].topic
        try:
            with consumer_span(f"outbox {topic}", rows[0].trace, rows=len(rows)):
                await asyncio.wait_for(self._handlers[topic](rows), LEASE.total_seconds() - 5)
        except Exception as error:  # noqa: BLE001 (whatever a handler raises, its rows must stay)
            await self._failed(rows, error)
            return
        await self._done(rows, "sent")

    async def _done(self, rows: list[OutboxRow], outcome: str) -> None:
        async with self._db.connection() as connection:
            await _delete(connection, [row.id for row in rows])
        metrics.outbox_rows.labels(topic=rows[0].topic, outcome=outcome).inc(len(rows))
        now = self._clock.now()
        for row in rows:
            metrics.outbox_dispatch_seconds.labels(topic=row.topic).observe(
                (now - row.created_at).total_seconds()
            )

    async def _failed(self, rows: list[OutboxRow], error: Exception) -> None:
        topic = rows[0].topic
        hopeless = isinstance(error, Failure) and error.kind in (Kind.INVALID, Kind.NOT_FOUND, Kind.TOO_LARGE)
        if hopeless and len(rows) > 1:
            for row in rows:
                await self._handle([row])
            return
        code = error.code if isinstance(error, Failure) else type(error).__name__
        if hopeless:
            log.error("outbox_row_refused", topic=topic, row=rows[0].id, code=code)
            await self._done(rows, "refused")
            return
        log.warning("outbox_failed", topic=topic, rows=len(rows), attempts=rows[0].attempts, code=code)
        delay = min(LONGEST_RETRY, FIRST_RETRY * 2 ** min(rows[0].attempts - 1, 16)) * random.uniform(
            0.5, 1.0
        )
        async with self._db.connection() as connection:
            await _postpone(
                connection, [row.id for row in rows], self._clock.now() + timedelta(seconds=delay), str(error)
            )
        metrics.outbox_rows.labels(topic=topic, outcome="failed").inc(len(rows))

    async def _housekeep(self) -> None:
        async with self._db.connection() as connection:
            if self._ttl is not None:
                for topic in await _expire(connection, self._ttl, 5_000, self._lasting):
                    metrics.outbox_rows.labels(topic=topic, outcome="expired").inc()
            waiting = await pending(connection)
        now = self._clock.now()
        for topic in {*self._handlers, *waiting}:
            count, oldest = waiting.get(topic, (0, now))
            metrics.outbox_pending.labels(topic=topic).set(count)
            metrics.outbox_oldest_seconds.labels(topic=topic).set(max(0.0, (now - oldest).total_seconds()))
