"""Valkey/Redis: transient data, hints between processes, and request-rate limits.

Losing it entirely costs latency, never data: everything in it can be rebuilt, and whoever missed a hint finds out by
reading PostgreSQL.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError

from whispr.kit.errors import RateLimited, Unavailable
from whispr.kit.subscription import Subscription
from whispr.kit.telemetry import get_logger, metrics

log = get_logger(__name__)

Handler = Callable[[bytes], None]

_ANSWER_SECONDS = 5.0
_PROOF_SECONDS = 2.5
_PAUSE_SECONDS = 0.1

LOST_CACHE: tuple[type[BaseException], ...] = (RedisError, OSError, asyncio.TimeoutError)


class CacheUnavailable(Unavailable):
    """The cache is not available. Try again."""

    code = "cache_unavailable"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, retry_after=1)


class Cache:
    """One process's door to Valkey.

    `client` answers bytes; its calls raise members of `LOST_CACHE` when Valkey is away. `run()` is the supervised loop
    that keeps the subscriptions.
    """

    def __init__(self, url: str, *, timeout: float = 2.0) -> None:
        # Waits for a free connection: a pool that refuses instead would send a burst past the shared rate limits, which
        # take any error for a lost Valkey and fall back to counting by themselves.
        self.client: Redis = Redis.from_pool(
            BlockingConnectionPool.from_url(
                url,
                # A connection that hears can publish only with this one.
                protocol=3,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                health_check_interval=15,
                max_connections=50,
                timeout=timeout,
                retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), 2),
            )
        )
        self._handlers: dict[str, list[Handler]] = {}
        self._changed = asyncio.Event()
        self._subscribed: set[str] = set()
        self._on_reconnect: list[Callable[[], None]] = []
        self._connected_before = False
        self._subscription: Subscription | None = None

    async def close(self) -> None:
        """Close every connection."""
        await self.client.aclose()

    async def ready(self) -> None:
        """Raise `CacheUnavailable` unless Valkey answers now."""
        try:
            await asyncio.wait_for(self.client.execute_command("PING"), 1.0)  # type: ignore[no-untyped-call]
        except LOST_CACHE as error:
            raise CacheUnavailable from error

    async def publish(self, channel: str, message: bytes) -> None:
        """Send a hint. Raises `CacheUnavailable`; whoever must know reads the truth from PostgreSQL."""
        try:
            await self.client.publish(channel, message)
        except LOST_CACHE as error:
            metrics.cache_failures.inc()
            raise CacheUnavailable from error

    def tell(self, messages: Iterable[tuple[str, bytes]]) -> bool:
        """Send hints on their channels without waiting; those of one process arrive in order.

        False, and they are lost, while the subscriptions are not served: who missed them is told of a reconnect then.
        """
        if self._subscription is not None and self._subscription.publish(messages):
            return True
        metrics.cache_failures.inc()
        return False

    def subscribe(self, channel: str, handler: Handler) -> None:
        """Call `handler` with each message of `channel`, in the order they were published."""
        self._handlers.setdefault(channel, []).append(handler)
        self._changed.set()

    def unsubscribe(self, channel: str, handler: Handler) -> None:
        """Stop calling `handler`; the channel is left when it was the last one."""
        handlers = self._handlers.get(channel, [])
        if handler in handlers:
            handlers.remove(handler)
        if not handlers:
            self._handlers.pop(channel, None)
        self._changed.set()

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` when subscriptions are back after a loss: hints were missed meanwhile."""
        self._on_reconnect.append(callback)

    @property
    def subscribed(self) -> frozenset[str]:
        """Channels whose subscription the server has been told of."""
        return frozenset(self._subscribed)

    async def run(self) -> None:
        """Keep the subscriptions for ever, over any loss of Valkey."""
        while True:
            try:
                await self._serve_subscriptions()
            except LOST_CACHE as error:
                log.warning("cache_subscription_lost", error=type(error).__name__)
            finally:
                self._subscribed = set()
            await asyncio.sleep(0.2)

    async def _serve_subscriptions(self) -> None:
        async with asyncio.timeout(_ANSWER_SECONDS):
            subscription = await Subscription.open(self.client, self._deliver)
        self._subscription = subscription
        try:
            await self._follow_handlers(subscription)
            if self._connected_before:
                metrics.cache_reconnects.inc()
                for callback in self._on_reconnect:
                    callback()
            self._connected_before = True
            await self._keep(subscription)
        finally:
            self._subscription = None
            await subscription.close()

    async def _keep(self, subscription: Subscription) -> None:
        """Follow what is wanted until the connection is gone, or silent."""
        prover = asyncio.create_task(self._prove(subscription))
        changed = asyncio.create_task(self._changed.wait())
        try:
            while True:
                ends: set[asyncio.Future[Any]] = {subscription.lost, prover, changed}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if prover.done():
                    prover.result()
                if subscription.lost.done():
                    log.warning("cache_subscription_lost", error="ConnectionLost")
                    return
                await self._follow_handlers(subscription)
                changed = asyncio.create_task(self._changed.wait())
        finally:
            for task in (prover, changed):
                task.cancel()
            await asyncio.gather(prover, changed, return_exceptions=True)

    async def _follow_handlers(self, subscription: Subscription) -> None:
        self._changed.clear()
        wanted = set(self._handlers)
        for channels, change in (
            (wanted - self._subscribed, subscription.subscribe),
            (self._subscribed - wanted, subscription.unsubscribe),
        ):
            if channels:
                # Not wait_for, which on 3.11 forgets a cancellation that arrives together with the answer: a process
                # that stops just after it has unsubscribed would wait for this loop for ever.
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await change(channels)
        self._subscribed = wanted

    def _deliver(self, channel: bytes, message: bytes) -> None:
        name = channel.decode()
        for handler in tuple(self._handlers.get(name, ())):
            try:
                handler(message)
            except Exception:
                # One bad hint must not end the subscription that everything else lives on.
                log.exception("cache_hint_failed", channel=name)

    async def _prove(self, subscription: Subscription) -> None:
        """Raises TimeoutError once the server is silent: a network that swallows packets closes no connection, and a
        subscription that is only waited on would be deaf for ever."""
        while True:
            subscription.ping()
            await asyncio.sleep(_PROOF_SECONDS)
            if not subscription.has_heard:
                # After a pause of this process its timers are served before what has come meanwhile.
                await asyncio.sleep(_PAUSE_SECONDS)
            if not subscription.has_heard:
                raise TimeoutError


# GCRA: the key holds the theoretical arrival time in microseconds of the server's clock, so that processes with
# skewed clocks share one limit. Returns 0 when allowed, else microseconds to wait.
_GCRA = """
local now = redis.call('TIME')
local t = now[1] * 1000000 + now[2]
local interval = tonumber(ARGV[1])
local burst = tonumber(ARGV[2])
local tat = tonumber(redis.call('GET', KEYS[1]) or t)
if tat < t then tat = t end
if tat + interval - t > interval * burst then return tat + interval - t - interval * burst end
redis.call('SET', KEYS[1], string.format('%.0f', tat + interval), 'PX', math.ceil((tat + interval - t) / 1000) + 1)
return 0
"""


class RateLimiter:
    """Request-rate limits shared by all processes; local to the process while Valkey is away.

    A limit of `limit` per `period` seconds allows bursts of `limit` and then one per `period / limit`.
    """

    _LOCAL_KEYS = 10_000

    def __init__(self, cache: Cache, *, enabled: bool = True) -> None:
        self._cache = cache
        self._enabled = enabled
        self._script = cache.client.register_script(_GCRA)
        self._local: OrderedDict[str, float] = OrderedDict()
        self._adjustments: dict[str, Callable[[int], int]] = {}

    def adjust(self, name: str, limit: Callable[[int], int]) -> None:
        """For the limit `name` take `limit(usual)`, asked at every request, instead of the usual one."""
        self._adjustments[name] = limit

    async def check(self, name: str, key: str, limit: int, period: float) -> None:
        """Count one request of `key` against the limit `name`. Raises `RateLimited` with the seconds to wait."""
        if not self._enabled:
            return
        adjust = self._adjustments.get(name)
        if adjust is not None:
            limit = adjust(limit)
        interval = period / limit
        full_key = f"ratelimit:{name}:{key}"
        try:
            wait = int(await self._script(keys=[full_key], args=[int(interval * 1e6), limit])) / 1e6
        except LOST_CACHE:
            metrics.cache_failures.inc()
            wait = self._check_local(full_key, interval, limit)
        if wait > 0:
            metrics.rate_limited.labels(name=name).inc()
            raise RateLimited(retry_after=max(1.0, round(wait, 1)), limit=name)

    def _check_local(self, key: str, interval: float, limit: int) -> float:
        now = time.monotonic()
        arrival = max(self._local.get(key, now), now)
        wait = arrival + interval - now - interval * limit
        if wait > 0:
            return wait
        self._local[key] = arrival + interval
        self._local.move_to_end(key)
        if len(self._local) > self._LOCAL_KEYS:
            self._local.popitem(last=False)
        return 0.0
