"""Delivered and read watermarks, coalesced in memory and written together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.errors import Failure, Internal, Unavailable
from whispr.kit.telemetry import get_logger
from whispr.services.messaging.models import Membership, ReceiptKind, Watermark
from whispr.services.messaging.store import receipts as store

log = get_logger(__name__)

Done = Callable[[Failure | None], None]

FLUSH_SECONDS = 0.2
MAX_WAITING = 50_000
BATCH = 2_000


class Receipts:
    """Marks of devices, merged per person and per device and written in one transaction a few times a second.

    Reading implies delivery. Watermarks only grow, and never past the conversation's head. `run()` is the supervised
    loop that writes.
    """

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self._people: dict[tuple[UUID, UUID], tuple[int, int]] = {}
        self._devices: dict[tuple[UUID, UUID], tuple[UUID, int]] = {}
        self._waiting: list[Done] = []
        self._sinks: list[Callable[[list[Watermark]], None]] = []
        self._wanted = asyncio.Event()
        self._writing = asyncio.Lock()

    def on_moved(self, callback: Callable[[list[Watermark]], None]) -> None:
        """Call `callback` after each commit with the watermarks that moved."""
        self._sinks.append(callback)

    def mark(
        self,
        membership: Membership,
        device_id: UUID,
        kind: ReceiptKind,
        seq: int,
        on_done: Done | None = None,
    ) -> None:
        """The device has (read) everything up to `seq`. `on_done` is called after the commit, or with what failed."""
        person = (membership.conversation_id, membership.user_id)
        if len(self._people) >= MAX_WAITING and person not in self._people:
            if on_done is not None:
                on_done(Unavailable("Too many receipts are waiting.", retry_after=1))
            return
        delivered, read = self._people.get(person, (0, 0))
        self._people[person] = (max(delivered, seq), max(read, seq) if kind is ReceiptKind.READ else read)
        device = (device_id, membership.conversation_id)
        _, known = self._devices.get(device, (membership.user_id, 0))
        self._devices[device] = (membership.user_id, max(known, seq))
        if on_done is not None:
            self._waiting.append(on_done)
        self._wanted.set()

    async def mark_now(self, membership: Membership, device_id: UUID, kind: ReceiptKind, seq: int) -> None:
        """`mark`, and return when it is stored. Raises `Unavailable`."""
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(failure: Failure | None) -> None:
            if stored.cancelled():
                return
            if failure is None:
                stored.set_result(None)
            else:
                stored.set_exception(failure)

        self.mark(membership, device_id, kind, seq, done)
        await self.flush()
        await stored

    async def run(self) -> None:
        """Write what was marked, at most every `FLUSH_SECONDS`, for ever."""
        while True:
            await self._wanted.wait()
            await asyncio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Write everything marked so far. A failure is told to those who wait, and the marks are let go.

        A device marks again with its next receipt, so nothing depends on these.
        """
        async with self._writing:
            self._wanted.clear()
            people, self._people = self._people, {}
            devices, self._devices = self._devices, {}
            waiting, self._waiting = self._waiting, []
            failure: Failure | None = None
            moved: list[Watermark] = []
            try:
                if people:
                    moved = await self._write(people, devices)
            except Failure as error:
                log.warning("receipts_not_written", code=error.code, people=len(people))
                failure = error
            except Exception:
                # Whoever waits is told, whatever it was: a caller left waiting would hold its request for ever.
                log.exception("receipts_crashed")
                failure = Internal()
        for callback in self._sinks if moved else ():
            callback(moved)
        for done in waiting:
            done(failure)

    async def _write(
        self,
        people: dict[tuple[UUID, UUID], tuple[int, int]],
        devices: dict[tuple[UUID, UUID], tuple[UUID, int]],
    ) -> list[Watermark]:
        moved: list[Watermark] = []
        now = self._clock.now()
        person_keys, device_keys = sorted(people), sorted(devices)
        for start in range(0, len(person_keys), BATCH):
            keys = person_keys[start : start + BATCH]
            async with self._db.transaction() as tx:
                moved += await store.advance(
                    tx,
                    [conversation for conversation, _ in keys],
                    [user for _, user in keys],
                    [people[key][0] for key in keys],
                    [people[key][1] for key in keys],
                    now,
                )
        for start in range(0, len(device_keys), BATCH):
            keys = device_keys[start : start + BATCH]
            async with self._db.transaction() as tx:
                await store.advance_cursors(
                    tx,
                    [device for device, _ in keys],
                    [conversation for _, conversation in keys],
                    [devices[key][0] for key in keys],
                    [devices[key][1] for key in keys],
                    now,
                )
        return moved
