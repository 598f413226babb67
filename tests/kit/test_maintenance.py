"""Maintenance of a service's own database by name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from whispr.kit.db import Database
from whispr.kit.maintenance import Maintenance, UnknownTask


@pytest.fixture
async def maintained(new_database: Callable[[str], str]) -> AsyncIterator[Database]:
    database = Database(new_database("maintenance"), pool_size=2)
    await database.open()
    async with database.connection() as conn:
        await conn.execute('CREATE TABLE plain (id int); CREATE TABLE "Odd ""name" (id int)')
        await conn.execute("CREATE TABLE parted (id int) PARTITION BY HASH (id)")
        await conn.execute(
            "CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
        )
    yield database
    await database.close()


async def no_retention() -> int:
    return 0


@pytest.mark.parametrize(("task", "column"), [("vacuum", "vacuum_count"), ("analyze", "analyze_count")])
async def test_every_table_is_reached_once(maintained: Database, task: str, column: str) -> None:
    assert await Maintenance(maintained, log_retention=no_retention).run(task) == 3
    async with maintained.connection() as conn:
        await conn.execute("SELECT pg_stat_force_next_flush()")
        rows = await conn.fetch(f"SELECT relname FROM pg_stat_user_tables WHERE {column} > 0")
    assert {row["relname"] for row in rows} >= {"plain", 'Odd "name', "parted_0"}


async def test_broken_indexes_are_mended_and_leftovers_dropped(maintained: Database) -> None:
    async with maintained.connection() as conn:
        await conn.execute("CREATE INDEX broken ON plain (id); CREATE INDEX sound ON plain (id)")
        await conn.execute("CREATE INDEX sound_ccnew ON plain (id)")
        # What an interrupted CREATE INDEX CONCURRENTLY leaves behind.
        await conn.execute(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid IN ('broken'::regclass, 'sound_ccnew'::regclass)"
        )
    maintenance = Maintenance(maintained, log_retention=no_retention)
    assert await maintenance.run("reindex") == 2
    assert await maintenance.run("reindex") == 0
    async with maintained.connection() as conn:
        rows = await conn.fetch(
            "SELECT c.relname, i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
            " WHERE i.indrelid = 'plain'::regclass"
        )
    assert {(row["relname"], row["indisvalid"]) for row in rows} == {("broken", True), ("sound", True)}


async def test_retention_is_the_services_own(maintained: Database) -> None:
    async def forget() -> int:
        return 42

    assert await Maintenance(maintained, log_retention=forget).run("log_retention") == 42


async def test_an_unknown_task_is_refused(maintained: Database) -> None:
    for task in ("", "VACUUM", "drop"):
        with pytest.raises(UnknownTask):
            await Maintenance(maintained, log_retention=no_retention).run(task)
