from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from tests.journeys.cable import Cable

from whispr.instance.valkey import EmbeddedValkey
from whispr.kit import cache as cache_module
from whispr.kit.cache import Cache, CacheUnavailable, RateLimiter
from whispr.kit.errors import RateLimited


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(url: str) -> AsyncIterator[Cache]:
    cache = Cache(url)
    loop = asyncio.create_task(cache.run())
    try:
        yield cache
    finally:
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        await cache.close()


async def test_hints_arrive_in_order_and_stop_when_unsubscribed(valkey_url: str) -> None:
    async with running(valkey_url) as cache:
        channel, heard = f"test:{uuid4()}", list[bytes]()
        cache.subscribe(channel, heard.append)
        await until(lambda: channel in cache.subscribed)
        for number in range(50):
            await cache.publish(channel, str(number).encode())
        await until(lambda: len(heard) == 50)
        assert heard == [str(number).encode() for number in range(50)]
        cache.unsubscribe(channel, heard.append)
        await until(lambda: channel not in cache.subscribed)


async def test_a_handler_that_fails_does_not_end_the_subscription(valkey_url: str) -> None:
    async with running(valkey_url) as cache:
        channel, heard = f"test:{uuid4()}", list[bytes]()

        def handle(message: bytes) -> None:
            heard.append(message)
            raise RuntimeError("bad hint")

        cache.subscribe(channel, handle)
        await until(lambda: channel in cache.subscribed)
        await cache.publish(channel, b"1")
        await cache.publish(channel, b"2")
        await until(lambda: heard == [b"1", b"2"])


async def test_the_subscription_can_be_stopped_at_any_moment(valkey_url: str) -> None:
    for turns in range(15):
        cache = Cache(valkey_url)
        loop = asyncio.create_task(cache.run())
        for _ in range(turns):
            await asyncio.sleep(0)
        loop.cancel()
        done, _ = await asyncio.wait({loop}, timeout=5)
        assert done, f"after {turns} turns of the loop"
        await cache.close()


async def test_what_is_told_arrives_in_order_among_what_is_published(valkey_url: str) -> None:
    async with running(valkey_url) as cache, running(valkey_url) as other:
        one, two, heard = f"test:{uuid4()}", f"test:{uuid4()}", list[tuple[str, bytes]]()
        other.subscribe(one, lambda message: heard.append((one, message)))
        other.subscribe(two, lambda message: heard.append((two, message)))
        await until(lambda: {one, two} <= other.subscribed)
        told = [((one, two)[number % 2], bytes([number]) * number * 1_000) for number in range(200)]
        await until(lambda: cache.tell(told[:1]))
        for start in range(1, 200, 7):
            assert cache.tell(told[start : start + 7])
        await until(lambda: len(heard) == 200)
        assert heard == told


async def test_nothing_is_told_while_the_server_is_away_or_does_not_read(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path).start()
    async with running(server.url) as cache:
        cache.subscribe("test", lambda message: None)
        await until(lambda: "test" in cache.subscribed)
        assert cache.tell([("test", b"heard")])
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            sent = 0
            while cache.tell([("other", bytes(1_000_000))]):
                sent += 1
                assert sent < 100, "what waits for a silent server must have an end"
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await until(lambda: cache.tell([("test", b"heard")]), 30)
        server.stop(grace=0)
        await until(lambda: "test" not in cache.subscribed)
        assert not cache.tell([("test", b"lost")])


async def test_subscriptions_come_back_after_a_kill_and_the_gap_is_told(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path).start()
    async with running(server.url) as cache:
        heard, gaps = list[bytes](), list[None]()
        cache.subscribe("test", heard.append)
        cache.on_reconnect(lambda: gaps.append(None))
        await until(lambda: "test" in cache.subscribed)
        server.stop(grace=0)
        with pytest.raises(CacheUnavailable):
            await cache.publish("test", b"lost")
        server.start()
        await until(lambda: len(gaps) == 1 and "test" in cache.subscribed)
        await cache.publish("test", b"heard")
        await until(lambda: heard == [b"heard"])
    server.stop()


async def test_a_subscription_that_the_network_swallowed_is_made_anew(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_PROOF_SECONDS", 0.1)
    monkeypatch.setattr(cache_module, "_ANSWER_SECONDS", 0.5)
    parts = urlsplit(valkey_url)
    async with Cable(parts.port or 0) as cable:
        netloc = f"{parts.netloc.rpartition(':')[0]}:{cable.port}"
        async with running(parts._replace(netloc=netloc).geturl()) as cache:
            channel, heard, gaps = f"test:{uuid4()}", list[bytes](), list[None]()
            cache.subscribe(channel, heard.append)
            cache.on_reconnect(lambda: gaps.append(None))
            await until(lambda: channel in cache.subscribed)
            cable.cut()
            await until(lambda: channel not in cache.subscribed)
            # Nothing tells the process that its old connection is dead.
            cable.heal(silently=True)
            await until(lambda: bool(gaps) and channel in cache.subscribed)
            async with running(valkey_url) as other:
                await other.publish(channel, b"heard again")
            await until(lambda: heard == [b"heard again"])


async def test_a_limit_allows_its_burst_and_then_says_how_long_to_wait(valkey_url: str) -> None:
    cache = Cache(valkey_url)
    limiter, other, key = RateLimiter(cache), RateLimiter(cache), uuid4().hex
    for number in range(5):
        await (limiter, other)[number % 2].check("try", key, limit=5, period=3600)
    with pytest.raises(RateLimited) as refused:
        await limiter.check("try", key, limit=5, period=3600)
    assert refused.value.retry_after == pytest.approx(720, abs=5)
    await limiter.check("try", uuid4().hex, limit=5, period=3600)
    await RateLimiter(cache, enabled=False).check("try", key, limit=5, period=3600)
    await cache.close()


async def test_limits_hold_in_the_process_while_valkey_is_away() -> None:
    cache = Cache("redis://127.0.0.1:1", timeout=0.2)
    limiter = RateLimiter(cache)
    for _ in range(3):
        await limiter.check("try", "someone", limit=3, period=3600)
    with pytest.raises(RateLimited):
        await limiter.check("try", "someone", limit=3, period=3600)
    await cache.close()


async def test_a_burst_larger_than_the_pool_still_meets_the_shared_limit(valkey_url: str) -> None:
    async with running(valkey_url) as cache:
        limiter, key = RateLimiter(cache), str(uuid4())
        answers = await asyncio.gather(
            *(limiter.check("test", key, 60, 3600) for _ in range(150)), return_exceptions=True
        )
        assert sum(answer is None for answer in answers) == 60
        assert sum(isinstance(answer, RateLimited) for answer in answers) == 90
