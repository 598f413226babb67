"""The schema goes up, down and up again."""

from __future__ import annotations

from collections.abc import Callable

import psycopg

from whispr.kit import migrate


def tables(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    return {row[0] for row in rows} - {"alembic_version"}


def test_up_down_up(new_database: Callable[[str], str]) -> None:
    url = new_database("user_migrations")
    migrate.upgrade("user", url)
    made = tables(url)
    assert made == {"profiles", "contacts", "blocks", "quotas", "storage_reservations", "operations"}
    migrate.downgrade("user", url)
    assert tables(url) == set()
    migrate.upgrade("user", url)
    assert tables(url) == made
