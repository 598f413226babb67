"""The schema goes up, down to nothing, and up again."""

from __future__ import annotations

from collections.abc import Callable

import asyncpg

from whispr.kit import migrate


async def tables(url: str) -> set[str]:
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        functions = await connection.fetch(
            "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        )
        return {row[0] for row in [*rows, *functions]} - {"alembic_version"}
    finally:
        await connection.close()


async def test_up_down_up(new_database: Callable[[str], str]) -> None:
    url = new_database("auth_migrations")
    migrate.upgrade("auth", url)
    full = await tables(url)
    assert {"accounts", "devices", "one_time_prekeys", "audit_events", "outbox"} <= full
    migrate.downgrade("auth", url)
    assert await tables(url) == set()
    migrate.upgrade("auth", url)
    assert await tables(url) == full
    assert migrate.current("auth", url) == migrate.head("auth")
