"""One conversation's log as a stream: every event once, in `seq` order, whatever happens to the connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from whispr.client.backoff import Backoff
from whispr.client.failures import ApiError, ClientError
from whispr.client.models import LogEvent, Member

MAX_HELD: Final = 1000
PATIENCE: Final = 5


class JoinReply(msgspec.Struct, frozen=True):
    """The answer to joining `conversation:ID`."""

    epoch: str
    head_seq: int
    recovered: bool = False
    events: list[LogEvent] = []
    more: bool = False
    members: list[Member] = []


class SyncReply(msgspec.Struct, frozen=True):
    events: list[LogEvent]
    more: bool = False


class Feed:
    """Takes events as they come, and gives each to `deliver` exactly once, in order, without holes.

    What is missing is fetched with `fetch(after_seq)`, again and again until it comes. `lost(first, last)` is called
    where the server says that it cannot give a range any more, so that a hole is never silent; nothing is
    reported for what lies before the first event a new member may see. `reset(epoch)` is called when the server's
    log is another than before (restored from a backup): numbering then begins anew.
    """

    def __init__(
        self,
        epoch: str | None,
        seq: int,
        *,
        deliver: Callable[[list[LogEvent]], None],
        fetch: Callable[[int], Awaitable[SyncReply]],
        lost: Callable[[int, int], None],
        reset: Callable[[str], None],
        backoff: Backoff | None = None,
    ) -> None:
        self.epoch = epoch
        self.seq = seq
        self.head = seq
        self._deliver = deliver
        self._fetch = fetch
        self._lost = lost
        self._reset = reset
        self._backoff = backoff or Backoff(base=0.2, cap=5.0)
        self._held: dict[int, LogEvent] = {}
        self._syncing: asyncio.Task[None] | None = None
        self._closed = False

    def params(self) -> dict[str, Any]:
        """Join parameters: the place to continue from."""
        return {} if self.epoch is None else {"cursor": {"epoch": self.epoch, "seq": self.seq}}

    def joined(self, reply: JoinReply) -> None:
        if self.epoch is not None and reply.epoch != self.epoch:
            self.seq = self.head = 0
            self._held.clear()
            self._reset(reply.epoch)
        self.epoch = reply.epoch
        self.head = max(self.head, reply.head_seq)
        self.offer(reply.events)

    def offer(self, events: list[LogEvent]) -> None:
        """Take events from anywhere, in any order, any number of times."""
        for event in events:
            self.head = max(self.head, event.seq)
            if event.seq > self.seq and (len(self._held) < MAX_HELD or event.seq == self.seq + 1):
                self._held[event.seq] = event
        self._advance()
        if self.seq < self.head and self._syncing is None and not self._closed:
            self._syncing = asyncio.create_task(self._sync())

    def close(self) -> None:
        self._closed = True
        if self._syncing is not None:
            self._syncing.cancel()

    def _advance(self) -> None:
        ready = []
        while (event := self._held.pop(self.seq + 1, None)) is not None:
            self.seq = event.seq
            ready.append(event)
        if ready:
            self._deliver(ready)

    async def _sync(self) -> None:
        try:
            attempt = 0
            while self.seq < self.head:
                attempt = 0 if await self._fetch_more(last_try=attempt >= PATIENCE) else attempt + 1
                if attempt:
                    await asyncio.sleep(self._backoff.delay(attempt))
        finally:
            self._syncing = None

    async def _fetch_more(self, *, last_try: bool) -> bool:
        """Whether it brought anything."""
        before, epoch = self.seq, self.epoch
        try:
            page = await self._fetch(before)
        except ApiError:
            return False
        except ClientError:
            # No connection: wait for as long as it takes, and never conclude that events are gone.
            await asyncio.sleep(self._backoff.delay(PATIENCE))
            return True
        if self.seq != before or self.epoch != epoch:
            return True  # live events were faster, or the log changed: ask again from where we are now
        for event in page.events:
            if event.seq > self.seq + 1:
                self._advance()
            if event.seq > self.seq + 1 and event.seq not in self._held:
                self._skip_to(event.seq)
            if event.seq > self.seq:
                self._held[event.seq] = event
                self._advance()
        if self.seq == before and last_try:
            # The server answers and has nothing between here and what we hold, or its head.
            self._skip_to(min(self._held, default=self.head + 1))
            self._advance()
        return self.seq > before

    def _skip_to(self, seq: int) -> None:
        if self.seq > 0:
            self._lost(self.seq + 1, seq - 1)
        self.seq = seq - 1
