"""Profiles start lazily from accounts and never come back from a tombstone."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest
from tests.services.user.conftest import World

from whispr.services.user.models import BatchTooLarge, InvalidUsername, UserNotFound


async def test_a_profile_starts_the_first_time_somebody_asks(world: World) -> None:
    user_id = world.account()
    profile = await world.service.profiles.own(user_id)
    assert profile.username == world.username(user_id)
    assert (profile.display_name, profile.locale, profile.time_zone) == (None, "en", "UTC")
    asked = len(world.book.questions)
    await world.service.profiles.own(user_id)
    assert len(world.book.questions) == asked, "a known person is not asked for again"


async def test_two_first_requests_at_once_make_one_profile(world: World) -> None:
    user_id = world.account()
    first, second = await asyncio.gather(*(world.service.profiles.own(user_id) for _ in range(2)))
    assert first == second


async def test_unknown_and_deleted_accounts_are_not_found(world: World) -> None:
    viewer = await world.person()
    deleted = world.account(status="deleted")
    for user_id in (uuid4(), deleted):
        with pytest.raises(UserNotFound):
            await world.service.profiles.view(viewer, user_id)
        with pytest.raises(UserNotFound):
            await world.service.profiles.own(user_id)
    assert await world.service.profiles.batch([deleted, uuid4()]) == []


async def test_a_suspended_account_keeps_its_profile(world: World) -> None:
    viewer = await world.person()
    suspended = world.account(status="suspended")
    assert (await world.service.profiles.view(viewer, suspended)).user_id == suspended


async def test_a_tombstone_outlives_a_late_answer_of_auth(world: World) -> None:
    user_id = await world.person()
    await world.service.erasure.erase(user_id)
    # auth still says the account is active, as an answer given just before the deletion would.
    with pytest.raises(UserNotFound):
        await world.service.profiles.own(user_id)
    viewer = await world.person()
    assert await world.service.profiles.search(viewer, world.username(user_id)) == []


async def test_erasure_of_somebody_never_heard_of_leaves_a_tombstone_too(world: World) -> None:
    user_id = world.account()
    await world.service.erasure.erase(user_id)
    with pytest.raises(UserNotFound):
        await world.service.profiles.own(user_id)


async def test_creation_and_erasure_at_once_always_end_in_a_tombstone(world: World) -> None:
    for _ in range(10):
        user_id = world.account()
        await asyncio.gather(
            world.service.profiles.own(user_id),
            world.service.erasure.erase(user_id),
            world.service.profiles.own(user_id),
            return_exceptions=True,
        )
        with pytest.raises(UserNotFound):
            await world.service.profiles.own(user_id)


async def test_search_finds_the_exact_name_in_any_case(world: World) -> None:
    viewer = await world.person()
    user_id = world.account(username=f"zoe.{uuid4().hex[:8]}")
    name = world.username(user_id)
    assert [found.user_id for found in await world.service.profiles.search(viewer, name)] == [user_id]
    assert [found.user_id for found in await world.service.profiles.search(viewer, name.upper())] == [user_id]
    assert await world.service.profiles.search(viewer, name[:-1]) == []
    assert await world.service.profiles.search(viewer, name.replace(".", "_")) == []


@pytest.mark.parametrize("name", ["", "ab", "a" * 33, "with space", "é" * 4, "a\0bc", "%%%", "x' OR 1=1"])
async def test_search_refuses_what_cannot_be_a_name(world: World, name: str) -> None:
    viewer = await world.person()
    with pytest.raises(InvalidUsername):
        await world.service.profiles.search(viewer, name)


async def test_a_batch_holds_a_thousand_ids(world: World) -> None:
    known = await world.person()
    strangers = [uuid4() for _ in range(999)]
    assert [profile.user_id for profile in await world.service.profiles.batch([known, *strangers])] == [known]
    with pytest.raises(BatchTooLarge):
        await world.service.profiles.batch([known, *strangers, uuid4()])
