"""auth alone, in this process: the other services are not needed to prove it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest
from tests.services.auth.house import AuthHouse

from whispr.kit import migrate
from whispr.kit.db import Connection


@pytest.fixture(scope="session")
async def house(
    new_database: Callable[[str], str], valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[AuthHouse]:
    """A running auth with a clock that tests move; each test has people of its own."""
    # Not the database of `stack`: its sessions would be cleaned away by a clock that is months ahead of its own.
    url = migrated(new_database("auth_house"))
    running = AuthHouse(valkey_url, tmp_path_factory.mktemp("auth"), url)
    await running.start()
    yield running
    await running.stop()


@pytest.fixture
async def rows(house: AuthHouse) -> AsyncIterator[Connection]:
    """A look into auth's database, behind its back."""
    connection: asyncpg.Connection[Any] = await asyncpg.connect(house.database_url)
    yield connection
    await connection.close()


@pytest.fixture(scope="session")
def rules_url(new_database: Callable[[str], str]) -> str:
    """A migrated database for tests of the rules without doors, away from the running auth's."""
    return migrated(new_database("auth_rules"))


@pytest.fixture
def fresh_url(new_database: Callable[[str], str]) -> str:
    """A migrated database of one test, for what is one per database: keys and the audit trail."""
    return migrated(new_database("auth_fresh"))


def migrated(url: str) -> str:
    migrate.upgrade("auth", url)
    return url
