"""What neighbours know and the hot path needs at hand: a read-through cache that asks ahead of need.

An entry is served for `lifetime` seconds and asked for again in the background from two thirds of that on, so that a
busy key never waits. While the neighbour cannot be asked, what it last said is served for up to `grace` seconds: its
restart must not stop the messages.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Generic, TypeVar

from whispr.kit.batching import Batcher
from whispr.kit.clock import Clock
from whispr.kit.errors import Failure, Kind, Unavailable

K = TypeVar("K")
V = TypeVar("V")

_RETRY_AFTER_FAILURE = 5.0

# What is asked for ahead of need may wait for more of the kind: it serves on for a third of its lifetime.
_GATHER_SECONDS = 0.5

# A refusal may ask again at once whether its ground still holds; this bounds how often that reaches the neighbour.
_RECENT = 1.0

_NEVER = float("inf")


class _Entry(Generic[V]):
    __slots__ = ("asked_again_at", "expires_at", "loaded_at", "value")

    def __init__(self, value: V, now: float, lifetime: float) -> None:
        self.value = value
        self.loaded_at = now
        self.expires_at = now + lifetime
        self.asked_again_at = now + lifetime * 2 / 3


class ReadThrough(Generic[K, V]):
    """Values by key. `fetch` answers for a list of keys and leaves out what it does not know."""

    def __init__(
        self,
        fetch: Callable[[list[K]], Awaitable[Mapping[K, V]]],
        clock: Clock,
        *,
        lifetime: float = 30.0,
        grace: float = 300.0,
        capacity: int = 50_000,
        chunk: int = 1_000,
    ) -> None:
        self._fetch = fetch
        self._asking: Batcher[list[K], Mapping[K, V]] = Batcher(self._fetch_together)
        self._clock = clock
        self._lifetime = lifetime
        self._grace = grace
        self._capacity = capacity
        self._chunk = chunk
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()
        self._loading: dict[K, asyncio.Future[None]] = {}
        self._outdated: set[K] = set()
        self._wanted: set[K] = set()
        self._refresher: asyncio.Task[None] | None = None

    def peek(self, key: K) -> V | None:
        """The value, if it is at hand and young enough. Sync: the hot path."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        now = self._clock.time()
        if now >= entry.expires_at:
            return None
        if now >= entry.asked_again_at:
            entry.asked_again_at = _NEVER
            self._refresh_soon(key)
        return entry.value

    async def load(self, keys: Iterable[K], *, again: bool = False) -> None:
        """Make the values present. `again` asks even for those at hand, unless that was within the last second.

        A key that the neighbour does not know stays absent. Raises `Failure` if one cannot be asked for that is
        neither at hand nor within its grace.
        """
        now = self._clock.time()
        missing = [key for key in dict.fromkeys(keys) if self._is_due(key, now, again)]
        waits = {id(future): future for key in missing if (future := self._loading.get(key)) is not None}
        to_fetch = [key for key in missing if key not in self._loading]
        for start in range(0, len(to_fetch), self._chunk):
            await self._load_chunk(to_fetch[start : start + self._chunk])
        for future in waits.values():
            await asyncio.shield(future)

    async def get(self, key: K) -> V | None:
        """The value, asked for if need be; None if the neighbour does not know the key."""
        await self.load([key])
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    def forget(self, key: K) -> None:
        """Drop what has changed at the neighbour. An answer under way is not believed either."""
        self._entries.pop(key, None)
        if key in self._loading:
            self._outdated.add(key)

    def expire(self) -> None:
        """Ask for everything anew; what is at hand only serves its grace."""
        now = self._clock.time()
        for entry in self._entries.values():
            entry.expires_at = min(entry.expires_at, now)
        self._outdated.update(self._loading)

    def _is_due(self, key: K, now: float, again: bool) -> bool:
        entry = self._entries.get(key)
        if entry is None or now >= entry.expires_at:
            return True
        return again and now - entry.loaded_at >= _RECENT

    async def _load_chunk(self, keys: list[K]) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Nobody may be waiting, and an unread exception would be reported as a defect.
        done.add_done_callback(lambda future: future.cancelled() or future.exception())
        for key in keys:
            self._loading[key] = done
        try:
            values = await self._asking.ask(keys)
        except Failure as failure:
            error = None if failure.kind is Kind.UNAVAILABLE and self._extend(keys) else failure
        except BaseException:
            # Whoever asked may have been cancelled; those who wait for the same answer have not.
            done.set_exception(Unavailable(retry_after=1))
            raise
        else:
            error = None
            self._keep(keys, values)
        finally:
            for key in keys:
                if self._loading.get(key) is done:
                    del self._loading[key]
                self._outdated.discard(key)
        if error is not None:
            done.set_exception(error)
            raise error
        done.set_result(None)

    async def _fetch_together(self, asked: list[list[K]]) -> list[Mapping[K, V]]:
        # No two of the lists have a key in common: what is being asked for is waited for.
        values = await self._fetch([key for keys in asked for key in keys])
        return [values] * len(asked)

    def _keep(self, keys: Collection[K], values: Mapping[K, V]) -> None:
        now = self._clock.time()
        for key in keys:
            if key not in values:
                self._entries.pop(key, None)
                continue
            # Outdated while it was under way: good for whoever waits for it now, and for nobody after.
            lifetime = 0.2 if key in self._outdated else self._lifetime
            self._entries[key] = _Entry(values[key], now, lifetime)
            self._entries.move_to_end(key)
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)

    def _extend(self, keys: Collection[K]) -> bool:
        """Serve what is at hand a little longer; whether that covers every key."""
        now = self._clock.time()
        covered = True
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or now - entry.loaded_at > self._grace:
                covered = False
                continue
            entry.expires_at = max(entry.expires_at, now + _RETRY_AFTER_FAILURE)
            entry.asked_again_at = now + _RETRY_AFTER_FAILURE / 2
        return covered

    def _refresh_soon(self, key: K) -> None:
        self._wanted.add(key)
        if self._refresher is None or self._refresher.done():
            self._refresher = asyncio.get_running_loop().create_task(self._refresh())

    async def _refresh(self) -> None:
        while self._wanted:
            await asyncio.sleep(_GATHER_SECONDS)
            keys, self._wanted = list(self._wanted), set()
            keys = [key for key in keys if key not in self._loading]
            for start in range(0, len(keys), self._chunk):
                try:
                    await self._load_chunk(keys[start : start + self._chunk])
                except Failure:
                    # Whoever needs the value after its end asks itself and is told.
                    continue
