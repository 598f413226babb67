from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import pytest

from whispr.kit.db import Database, DatabaseUnavailable
from whispr.kit.errors import Conflict
from whispr.kit.telemetry import metrics


@pytest.fixture(scope="module")
async def db(new_database: Callable[[str], str]) -> AsyncIterator[Database]:
    database = Database(new_database("kit_db"), pool_size=3, acquire_timeout=2)
    await database.open()
    async with database.connection() as connection:
        await connection.execute("CREATE TABLE notes (id int PRIMARY KEY, body jsonb)")
    yield database
    await database.close()


async def test_json_goes_in_and_out_as_python(db: Database) -> None:
    async with db.transaction() as tx:
        await tx.execute("INSERT INTO notes VALUES (1, $1)", {"a": [1, "é"]})
    async with db.connection() as connection:
        assert await connection.fetchval("SELECT body FROM notes WHERE id = 1") == {"a": [1, "é"]}


async def test_a_failure_rolls_back(db: Database) -> None:
    async def change_mind() -> None:
        async with db.transaction() as tx:
            await tx.execute("INSERT INTO notes VALUES (2, NULL)")
            raise Conflict

    with pytest.raises(Conflict):
        await change_mind()
    async with db.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM notes WHERE id = 2") == 0


async def test_a_transaction_left_open_is_not_handed_on(new_database: Callable[[str], str]) -> None:
    alone = Database(new_database("left"), pool_size=1)
    await alone.open()
    try:
        async with alone.connection() as connection:
            await connection.execute("CREATE TABLE left_open (value int)")
            await connection.execute("BEGIN")
            await connection.execute("INSERT INTO left_open VALUES (1)")
        async with alone.connection() as connection:
            assert not connection.is_in_transaction()
            assert await connection.fetchval("SELECT count(*) FROM left_open") == 0
    finally:
        await alone.close()


async def test_using_a_connection_costs_no_statement_of_its_own(new_database: Callable[[str], str]) -> None:
    alone = Database(new_database("spare"), pool_size=1, application_name="spare")
    watcher = Database(new_database("spare-watcher"), pool_size=1)
    await alone.open()
    await watcher.open()
    try:
        async with alone.connection() as connection:
            pid = connection.get_server_pid()
            await connection.fetchval("SELECT 'the last statement'")
        async with watcher.connection() as connection:
            last = await connection.fetchval("SELECT query FROM pg_stat_activity WHERE pid = $1", pid)
        assert last == "SELECT 'the last statement'"
    finally:
        await alone.close()
        await watcher.close()


async def test_a_cut_connection_is_a_failure_and_the_next_call_works(db: Database) -> None:
    with pytest.raises(DatabaseUnavailable):
        async with db.transaction() as tx:
            await tx.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    await db.ready()


async def test_every_connection_of_the_pool_may_be_cut_at_once(db: Database) -> None:
    async def one() -> object:
        async with db.connection() as connection:
            return await connection.fetchval("SELECT pg_sleep(0.05), 1")

    await asyncio.gather(*(one() for _ in range(3)))
    async with db.connection() as connection:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        while await connection.fetchval(
            "SELECT count(*) > 1 FROM pg_stat_activity WHERE datname = current_database()"
        ):
            await asyncio.sleep(0.01)
    # A connection that is not known to be cut yet may be handed out, once each.
    answers = await asyncio.gather(*(db.ready() for _ in range(6)), return_exceptions=True)
    failures = [answer for answer in answers if answer is not None]
    assert len(failures) <= 2
    assert all(isinstance(failure, DatabaseUnavailable) for failure in failures)
    await asyncio.gather(*(db.ready() for _ in range(3)))


async def test_the_metrics_count_connections(db: Database) -> None:
    async with db.connection():
        assert db.sizes[1:] == (1, 3)
        shown = metrics.exposition().decode()
    assert 'whispr_db_connections{state="used"}' in shown


async def test_a_server_that_is_away_is_unavailable_and_not_a_drivers_exception(db: Database) -> None:
    away = Database("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(DatabaseUnavailable):
        await away.open(timeout=0)
    with pytest.raises(DatabaseUnavailable):
        await away.ready()


async def test_a_full_pool_is_unavailable_in_time(db: Database, new_database: Callable[[str], str]) -> None:
    small = Database(urlsplit(new_database("kit_db_small")).geturl(), pool_size=1, acquire_timeout=0.1)
    await small.open()
    async with small.connection():
        with pytest.raises(DatabaseUnavailable):
            async with small.connection():
                pass
    await small.ready()
    await small.close()
