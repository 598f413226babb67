"""The rules of the user service over a real database and a real Valkey; `stack` brings the doors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from uuid import UUID, uuid4

import msgspec
import pytest

from whispr.kit.cache import Cache, RateLimiter
from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.kit.ids import uuid7
from whispr.services.user.service import UserService
from whispr.services.user.settings import UserSettings


@dataclass(frozen=True)
class Account:
    user_id: UUID
    username: str
    status: str
    created_at: datetime


@dataclass
class AccountBook:
    """The accounts that exist, in the place of `auth`; the tests with `stack` ask the real one."""

    accounts: dict[UUID, Account] = field(default_factory=dict)
    questions: list[object] = field(default_factory=list)

    async def get_user_info(
        self, user_ids: Sequence[UUID] = (), username: str | None = None
    ) -> list[Account]:
        self.questions.append(username or list(user_ids))
        return [
            account
            for account in self.accounts.values()
            if account.user_id in user_ids or (username is not None and account.username == username)
        ]


class World:
    """A user service with its surroundings."""

    def __init__(self, database: Database, cache: Cache, url: str) -> None:
        self.database = database
        self.cache = cache
        self.clock = ManualClock()
        self.book = AccountBook()
        self.settings = UserSettings(database_url=url)
        self.service = self.make()

    def make(self, *, limited: bool = False, **changes: int) -> UserService:
        """The same service with other settings."""
        return UserService(
            self.database,
            self.book,
            self.cache.publish,
            RateLimiter(self.cache, enabled=limited),
            self.clock,
            self.settings.model_copy(update=changes),
        )

    def account(self, username: str | None = None, status: str = "active") -> UUID:
        """A new account that the user service has not heard of."""
        user_id = uuid7()
        name = username or f"u{uuid4().hex[:20]}"
        self.book.accounts[user_id] = Account(user_id, name, status, self.clock.now())
        return user_id

    async def person(self) -> UUID:
        """Somebody who has a profile."""
        user_id = self.account()
        await self.service.profiles.own(user_id)
        return user_id

    def username(self, user_id: UUID) -> str:
        return self.book.accounts[user_id].username

    def delete_account(self, user_id: UUID) -> None:
        self.book.accounts[user_id] = replace(self.book.accounts[user_id], status="deleted")

    async def hints(self, act: Callable[[], object]) -> list[tuple[str, UUID]]:
        """What `act` (a function that returns an awaitable) tells messaging."""
        heard: list[tuple[str, UUID]] = []
        arrived = asyncio.Event()

        def listen(message: bytes) -> None:
            hint = msgspec.json.decode(message)
            heard.append((hint["kind"], UUID(hint["user_id"])))
            if hint["user_id"] == str(UUID(int=0)):
                arrived.set()

        self.cache.subscribe("cache:invalidate:messaging", listen)
        while "cache:invalidate:messaging" not in self.cache.subscribed:
            await asyncio.sleep(0.01)
        try:
            await act()  # type: ignore[misc]
            # Valkey keeps the order of one publisher, so this one arrives last.
            await self.cache.publish(
                "cache:invalidate:messaging", msgspec.json.encode({"kind": "end", "user_id": UUID(int=0)})
            )
            await asyncio.wait_for(arrived.wait(), 5)
        finally:
            self.cache.unsubscribe("cache:invalidate:messaging", listen)
        return [hint for hint in heard if hint[0] != "end"]


@pytest.fixture(scope="session")
async def world(database: Callable[[str], str], valkey_url: str) -> AsyncIterator[World]:
    url = database("user")
    opened = Database(url, pool_size=8)
    await opened.open()
    cache = Cache(valkey_url)
    listening = asyncio.create_task(cache.run())
    yield World(opened, cache, url)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await cache.close()
    await opened.close()
