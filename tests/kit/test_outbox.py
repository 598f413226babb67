from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta

import pytest

from whispr.kit import outbox
from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.kit.errors import Conflict, Invalid, Unavailable
from whispr.kit.outbox import Dispatcher, OutboxRow


@pytest.fixture(scope="module")
async def opened(new_database: Callable[[str], str]) -> AsyncIterator[Database]:
    database = Database(new_database("kit_outbox"), pool_size=5)
    await database.open()
    async with database.connection() as connection:
        await connection.execute(outbox.SCHEMA)
    yield database
    await database.close()


@pytest.fixture
async def db(opened: Database) -> Database:
    async with opened.connection() as connection:
        await connection.execute("TRUNCATE outbox")
    return opened


class Receiver:
    """Plays the other end: keeps what it was given, or fails as told."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.batches: list[int] = []
        self.failure: Exception | None = None
        self.refuses: set[str] = set()

    async def take(self, rows: list[OutboxRow]) -> None:
        self.batches.append(len(rows))
        if self.failure is not None:
            raise self.failure
        if any(row.key in self.refuses for row in rows):
            raise Invalid
        self.keys += [row.key for row in rows]


async def write(db: Database, *keys: str, topic: str = "a") -> None:
    async with db.transaction() as tx:
        for key in keys:
            await outbox.add(tx, topic, key, {"key": key})


async def let_age(db: Database, hours: int) -> None:
    """Rows are dated by the database, so their age is moved there."""
    async with db.connection() as connection:
        await connection.execute("UPDATE outbox SET created_at = created_at - $1 * interval '1 hour'", hours)


async def count(db: Database) -> int:
    async with db.connection() as connection:
        return sum(number for number, _ in (await outbox.pending(connection)).values())


async def test_rows_are_sent_in_order_and_removed(db: Database) -> None:
    receiver, clock = Receiver(), ManualClock()
    await write(db, *"1234567")
    dispatcher = Dispatcher(db, clock, {"a": receiver.take}, batch=3)
    while await dispatcher.drain_once():
        pass
    assert receiver.keys == list("1234567")
    assert receiver.batches == [3, 3, 1]
    assert await count(db) == 0


async def test_an_effect_of_a_rolled_back_change_is_never_sent(db: Database) -> None:
    receiver = Receiver()

    async def change_mind() -> None:
        async with db.transaction() as tx:
            await outbox.add(tx, "a", "1", {})
            raise Conflict

    with pytest.raises(Conflict):
        await change_mind()
    assert await Dispatcher(db, ManualClock(), {"a": receiver.take}).drain_once() == 0


async def test_a_failed_batch_is_tried_again_later_and_later(db: Database) -> None:
    receiver, clock = Receiver(), ManualClock()
    receiver.failure = Unavailable()
    dispatcher = Dispatcher(db, clock, {"a": receiver.take})
    await write(db, "1")
    assert await dispatcher.drain_once() == 1
    assert await dispatcher.drain_once() == 0
    for _ in range(10):
        clock.advance(outbox.LONGEST_RETRY)
        assert await dispatcher.drain_once() == 1
    receiver.failure = None
    clock.advance(outbox.LONGEST_RETRY)
    await dispatcher.drain_once()
    assert receiver.keys == ["1"]


async def test_a_row_the_other_side_refuses_does_not_block_the_rest(db: Database) -> None:
    receiver = Receiver()
    receiver.refuses = {"2"}
    await write(db, "1", "2", "3")
    await Dispatcher(db, ManualClock(), {"a": receiver.take}).drain_once()
    assert receiver.keys == ["1", "3"]
    assert await count(db) == 0


async def test_a_topic_that_fails_does_not_delay_another(db: Database) -> None:
    failing, working, clock = Receiver(), Receiver(), ManualClock()
    failing.failure = RuntimeError("defect")
    await write(db, "1", topic="a")
    await write(db, "2", topic="b")
    dispatcher = Dispatcher(db, clock, {"a": failing.take, "b": working.take})
    await dispatcher.drain_once()
    await dispatcher.drain_once()
    assert working.keys == ["2"]
    assert await count(db) == 1


async def test_rows_without_a_handler_wait_and_expire(db: Database) -> None:
    await write(db, "1", topic="nobody")
    dispatcher = Dispatcher(db, ManualClock(), {"a": Receiver().take}, ttl=timedelta(hours=24))
    assert await dispatcher.drain_once() == 0
    await let_age(db, 23)
    await dispatcher._housekeep()
    assert await count(db) == 1
    await let_age(db, 2)
    await dispatcher._housekeep()
    assert await count(db) == 0


async def test_a_clock_that_stands_ahead_throws_nothing_away(db: Database) -> None:
    clock = ManualClock()
    clock.advance(1_000 * 3600)
    await write(db, "1", topic="nobody")
    await Dispatcher(db, clock, {"a": Receiver().take}, ttl=timedelta(hours=24))._housekeep()
    assert await count(db) == 1


async def test_rows_of_a_lasting_topic_wait_for_ever(db: Database) -> None:
    await write(db, "1", topic="nobody")
    await write(db, "2", topic="lasting")
    dispatcher = Dispatcher(
        db, ManualClock(), {"a": Receiver().take}, ttl=timedelta(hours=24), lasting={"lasting", "unused"}
    )
    await let_age(db, 1_000)
    await dispatcher._housekeep()
    async with db.connection() as connection:
        assert list(await outbox.pending(connection)) == ["lasting"]


async def test_a_dispatcher_that_dies_only_delays_its_rows(db: Database) -> None:
    clock, stuck = ManualClock(), asyncio.Event()

    async def hang(rows: list[OutboxRow]) -> None:
        stuck.set()
        await asyncio.Event().wait()

    await write(db, "1")
    dying = asyncio.create_task(Dispatcher(db, clock, {"a": hang}).drain_once())
    await stuck.wait()
    dying.cancel()
    receiver = Receiver()
    dispatcher = Dispatcher(db, clock, {"a": receiver.take})
    assert await dispatcher.drain_once() == 0
    clock.advance(outbox.LEASE.total_seconds() + 1)
    assert await dispatcher.drain_once() == 1
    assert receiver.keys == ["1"]


async def test_two_dispatchers_share_the_rows_without_sending_one_twice(db: Database) -> None:
    receiver, clock = Receiver(), ManualClock()
    await write(db, *(str(number) for number in range(200)))
    dispatchers = [Dispatcher(db, clock, {"a": receiver.take}, batch=10) for _ in range(4)]

    async def drain(dispatcher: Dispatcher) -> None:
        while await dispatcher.drain_once():
            pass

    await asyncio.gather(*(drain(dispatcher) for dispatcher in dispatchers))
    assert sorted(receiver.keys, key=int) == [str(number) for number in range(200)]


async def test_the_loop_sends_as_soon_as_it_is_woken(db: Database) -> None:
    receiver = Receiver()
    dispatcher = Dispatcher(db, ManualClock(), {"a": receiver.take}, idle=3600)
    loop = asyncio.create_task(dispatcher.run())
    await asyncio.sleep(0)
    await write(db, "1")
    dispatcher.wake()
    async with asyncio.timeout(5):
        while receiver.keys != ["1"]:
            await asyncio.sleep(0.01)
    loop.cancel()
