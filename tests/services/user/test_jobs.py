"""The loops do their work at once and outlive a database that is away."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest
from tests.services.user.conftest import World

from whispr.kit.cache import RateLimiter
from whispr.kit.db import Database
from whispr.services.user.jobs import loops
from whispr.services.user.models import StorageRequest
from whispr.services.user.service import UserService


async def test_abandoned_reservations_are_given_back_by_the_loop(world: World) -> None:
    user_id = await world.person()
    await world.service.storage.update(StorageRequest(uuid4(), user_id, "reserve", 100))
    world.clock.advance(world.settings.reservation_seconds)
    loop = asyncio.ensure_future(loops(world.service)["expire_reservations"]())
    try:
        async with asyncio.timeout(5):
            while (await world.service.storage.quotas(user_id)).storage.reserved:
                await asyncio.sleep(0.01)
    finally:
        loop.cancel()


@pytest.mark.parametrize("name", ["expire_reservations", "forget_operations"])
async def test_a_database_that_is_away_is_no_crash(world: World, name: str) -> None:
    closed = Database(world.settings.database_url)
    limiter = RateLimiter(world.cache, enabled=False)
    service = UserService(closed, world.book, world.cache.publish, limiter, world.clock, world.settings)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(loops(service)[name](), 0.1)
