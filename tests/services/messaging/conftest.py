"""Messaging's own database and a cache, for tests of its parts without the doors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from tests.services.messaging.ages import Ages
from tests.services.messaging.plans import Node, World

from whispr.kit import migrate
from whispr.kit.cache import Cache
from whispr.kit.db import Database


@pytest.fixture
async def messaging_db(database: Callable[[str], str]) -> AsyncIterator[Database]:
    """The migrated database of messaging."""
    db = Database(database("messaging"), pool_size=5)
    await db.open()
    yield db
    await db.close()


@pytest.fixture
async def messaging_cache(valkey_url: str) -> AsyncIterator[Cache]:
    """A cache that hears its subscriptions."""
    cache = Cache(valkey_url)
    listening = asyncio.create_task(cache.run())
    yield cache
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await cache.close()


@pytest.fixture(scope="session")
def aging_url(new_database: Callable[[str], str]) -> str:
    """A migrated database of messaging that no running service looks at."""
    url = new_database("messaging_ages")
    migrate.upgrade("messaging", url)
    return url


@pytest.fixture
async def ages(aging_url: str) -> AsyncIterator[Ages]:
    """That database, empty, with a clock that stands still."""
    made = Ages(aging_url)
    await made.db.open()
    async with made.db.connection() as connection:
        await connection.execute(
            "TRUNCATE conversations, messages, conversation_events, outbox, receipt_marks CASCADE"
        )
    yield made
    await made.db.close()


@pytest.fixture(scope="session")
def plans_url(new_database: Callable[[str], str]) -> str:
    """A migrated database of messaging whose scheduled messages no running service sends."""
    url = new_database("messaging_plans")
    migrate.upgrade("messaging", url)
    return url


@pytest.fixture
async def world(plans_url: str, valkey_url: str) -> AsyncIterator[World]:
    """What nodes that schedule and send share, with nothing scheduled yet."""
    async with World.open(plans_url, valkey_url) as made:
        async with made.db.connection() as connection:
            await connection.execute("TRUNCATE scheduled_messages")
        yield made


@pytest.fixture
async def node(world: World) -> Node:
    """One of them."""
    return world.node()
