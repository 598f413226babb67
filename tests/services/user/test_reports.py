"""Reports tell of many and never of few; cleanup rests the absent and nobody else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.services.user.conftest import World

from whispr.kit import migrate
from whispr.kit.db import Database
from whispr.services.user.models import InvalidPeriod, OperationConflict, PresenceQuestion, Privacy
from whispr.services.user.service.reports import folded


@pytest.fixture
async def alone(world: World, new_database: Callable[[str], str]) -> AsyncIterator[World]:
    """A user service with an empty database: reports and cleanup concern everybody."""
    url = new_database("user_reports")
    migrate.upgrade("user", url)
    database = Database(url, pool_size=3)
    await database.open()
    yield World(database, world.cache, url)
    await database.close()


async def test_numbers_below_the_threshold_are_withheld(alone: World) -> None:
    service = alone.make(report_threshold=3)
    start, end = alone.clock.now() - timedelta(days=1), alone.clock.now() + timedelta(days=1)
    people = [await alone.person() for _ in range(2)]
    few = await service.reports.activity(start, end)
    assert few["profiles"] == {
        "total": None,
        "dormant": None,
        "created": None,
        "last_active": None,
        "erased": None,
    }
    assert few["locales"] == {}
    people.append(await alone.person())
    for owner in people:
        for other in people:
            if owner != other:
                await service.relations.add_contact(owner, other)
    await service.relations.block(people[0], people[1])
    report = await service.reports.activity(start, end)
    assert (
        report["profiles"]["total"] == report["profiles"]["created"] == report["profiles"]["last_active"] == 3
    )
    assert report["profiles"]["erased"] is None
    assert report["relations"] == {"contacts": 5, "blocks": None}
    assert report["storage"] == {"people": None, "used_bytes": None}
    assert report["locales"] == {"en": 3}
    later = await service.reports.activity(end, end + timedelta(days=2))
    assert later["profiles"]["total"] == 3
    assert later["profiles"]["created"] is None


async def test_reports_are_about_whole_days(alone: World) -> None:
    now = alone.clock.now()
    report = await alone.service.reports.activity(now - timedelta(days=1, hours=3), now)
    assert report["from"].endswith("T00:00:00+00:00")
    assert report["until"].endswith("T00:00:00+00:00")
    with pytest.raises(InvalidPeriod):
        await alone.service.reports.activity(now, now)


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 30)), st.integers(2, 12))
def test_folding_shows_no_small_group_and_lets_none_be_computed(
    groups: dict[str, int], threshold: int
) -> None:
    shown = folded(groups, threshold)
    assert all(count >= threshold for count in shown.values())
    hidden = sum(groups.values()) - sum(shown.values())
    assert hidden == 0 or (not shown and hidden < threshold)
    assert all(groups[name] == count for name, count in shown.items() if name != "other")


async def test_cleanup_rests_the_absent_and_keeps_them_safe(alone: World) -> None:
    absent, blocked, present = [await alone.person() for _ in range(3)]
    await alone.service.profiles.update(absent, {"display_name": "Ada", "privacy": {"messages": "contacts"}})
    await alone.service.relations.add_contact(absent, present)
    await alone.service.relations.block(absent, blocked)
    alone.clock.advance(400 * 86_400)
    await alone.service.profiles.own(present)
    await alone.service.relations.presence_visibility([PresenceQuestion(blocked, ())])
    since = alone.clock.now() - timedelta(days=365)

    async def cleanup(**options: object) -> int:
        return await alone.service.reports.cleanup_inactive(uuid4(), since, **options)  # type: ignore[arg-type]

    assert await cleanup(dry_run=True, limit=0) == 1
    assert (await alone.service.profiles.batch([absent]))[0].display_name == "Ada"
    assert await alone.hints(lambda: cleanup(dry_run=False, limit=0)) == [
        ("profile", absent),
        ("relations", absent),
    ]
    (rested,) = await alone.service.profiles.batch([absent])
    assert (rested.display_name, rested.privacy) == (None, Privacy(messages="contacts"))
    assert (await alone.service.relations.contacts(absent, None, 10)).items == []
    assert len((await alone.service.relations.blocks(absent, None, 10)).items) == 1
    assert await cleanup(dry_run=False, limit=0) == 0, "nobody is put to rest twice"
    await alone.service.profiles.own(absent)
    assert await cleanup(dry_run=True, limit=0) == 0, "who comes back is there again"


async def test_cleanup_takes_the_longest_absent_first_and_repeats_its_answer(alone: World) -> None:
    people = []
    for _ in range(3):
        people.append(await alone.person())
        alone.clock.advance(86_400)
    since, operation = alone.clock.now(), uuid4()
    for _ in range(2):
        assert await alone.service.reports.cleanup_inactive(operation, since, dry_run=False, limit=2) == 2
    async with alone.database.connection() as conn:
        rows = await conn.fetch("SELECT user_id FROM profiles WHERE state = 'dormant'")
    assert {row["user_id"] for row in rows} == set(people[:2])
    with pytest.raises(OperationConflict):
        await alone.service.reports.cleanup_inactive(operation, since, dry_run=False, limit=3)
