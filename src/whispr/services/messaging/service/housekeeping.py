"""What is thinned out or forgotten with time."""

from __future__ import annotations

from datetime import timedelta

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.services.messaging.store import expiry
from whispr.services.messaging.store import receipts as store

CHUNK = 5_000


class Housekeeping:
    """Keeps the receipts' tables from growing for ever, and erased messages from staying in the pages of theirs."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        *,
        receipt_detail: timedelta,
        cursor_life: timedelta,
    ) -> None:
        self._db = db
        self._clock = clock
        self._receipt_detail = receipt_detail
        self._cursor_life = cursor_life

    async def run_once(self) -> int:
        """Thin old receipt times to one a day and forget the cursors of silent devices; how many rows went."""
        now = self._clock.now()
        gone = 0
        for statement, before in (
            (store.thin_marks, now - self._receipt_detail),
            (store.forget_cursors, now - self._cursor_life),
        ):
            while True:
                # Small transactions: a long one would keep vacuum from every table of the database.
                async with self._db.connection() as connection:
                    removed = await statement(connection, before, CHUNK)
                gone += removed
                if removed < CHUNK:
                    break
        # PostgreSQL by itself waits until a fifth of a table has changed: for ever, where few messages disappear.
        async with self._db.connection() as connection:
            await expiry.vacuum_messages(connection)
        return gone
