"""Usage reports: right numbers about many, none about few."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from tests.services.messaging.ages import Ages

from whispr.services.messaging.service.usage import InvalidPeriod, Usage
from whispr.services.messaging.store import changes

DAY = timedelta(days=1)


def midnight(ages: Ages) -> datetime:
    return ages.clock.now().astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


async def test_a_report_counts_whole_days(ages: Ages) -> None:
    usage = Usage(ages.db, ages.clock, threshold=2)
    people = [uuid4() for _ in range(3)]
    ages.clock.advance((midnight(ages) + DAY + timedelta(hours=1) - ages.clock.now()).total_seconds())
    first_day = midnight(ages)
    groups = [await ages.group(one, *people) for one in (uuid4(), uuid4())]
    heads = [await ages.send(groups[0], one) for one in people for _ in range(2)]
    async with ages.db.transaction() as tx:
        await changes.tombstone(tx, groups[0], [heads[0].id, heads[2].id])
    ages.clock.advance(DAY.total_seconds())
    await ages.send(groups[1], people[0])
    whole = await usage.report(first_day, first_day + timedelta(hours=1) + DAY)
    assert whole["messages"] == {
        "text": 6,
        "erased": 2,
        "media": None,
        "system": None,
        "edited": None,
        "scheduled": None,
        "reported": None,
    }
    assert whole["conversations"] == {"group": 2, "direct": None}
    assert (whole["from"], whole["until"]) == (first_day.isoformat(), (first_day + DAY).isoformat())
    both = await usage.report(first_day, first_day + 2 * DAY)
    assert both["messages"]["text"] == 7


async def test_few_people_are_left_out(ages: Ages) -> None:
    day = midnight(ages)
    people = [uuid4() for _ in range(3)]
    group = await ages.group(*people)
    for one in people[:2]:
        for _ in range(50):
            await ages.send(group, one)
    report = await Usage(ages.db, ages.clock, threshold=3).report(day, day + DAY)
    assert set(report["messages"].values()) == {None}
    assert str(people[0]) not in str(report)
    assert (await Usage(ages.db, ages.clock, threshold=2).report(day, day + DAY))["messages"]["text"] == 100


@pytest.mark.parametrize("length", [timedelta(0), -DAY, timedelta(hours=5)])
async def test_a_period_without_a_whole_day_is_refused(ages: Ages, length: timedelta) -> None:
    day = midnight(ages)
    with pytest.raises(InvalidPeriod):
        await Usage(ages.db, ages.clock, threshold=2).report(day, day + length)


async def test_reports_find_messages_by_their_time(ages: Ages) -> None:
    """Not by reading all of them: a small part of the index leads to a day's."""
    async with ages.db.connection() as connection:
        await connection.execute("SET enable_seqscan = off")
        plan = await connection.fetch(
            "EXPLAIN SELECT FROM messages WHERE sent_at >= now() - interval '1 day'"
        )
        await connection.execute("RESET enable_seqscan")
    assert sum("sent_at_idx" in line[0] for line in plan) == 16, plan
