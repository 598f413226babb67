"""A hint that could not be sent is sent when Valkey is back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import UUID, uuid4

import msgspec

from whispr.instance.valkey import EmbeddedValkey
from whispr.kit.cache import Cache
from whispr.services.user.service.hints import CHANNEL, Hints


async def test_a_hint_is_sent_when_valkey_is_back(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path).start()
    cache, heard = Cache(server.url, timeout=0.5), list[bytes]()
    hints = Hints(cache.publish)
    loops = [asyncio.create_task(cache.run())]
    ann, bob, carl = sorted(uuid4() for _ in range(3))
    try:
        server.stop(grace=0)
        await hints.changed("relations", ann, bob)
        await hints.changed("relations", bob, carl)
        await hints.changed("profile", ann)
        cache.subscribe(CHANNEL, heard.append)
        server.start()
        async with asyncio.timeout(20):
            while CHANNEL not in cache.subscribed:
                await asyncio.sleep(0.02)
            loops.append(asyncio.create_task(hints.run()))
            while len(heard) < 4:
                await asyncio.sleep(0.02)
        told = sorted((UUID(hint["user_id"]), hint["kind"]) for hint in map(msgspec.json.decode, heard))
        assert told == [(ann, "profile"), (ann, "relations"), (bob, "relations"), (carl, "relations")]
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await cache.close()
        server.stop()
