"""What people may say of themselves, and what others are shown of it."""

from __future__ import annotations

import unicodedata
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.services.user.conftest import World

from whispr.kit.errors import Failure, RateLimited
from whispr.services.user.models import (
    InvalidDisplayName,
    InvalidLocale,
    InvalidTimeZone,
    Privacy,
    UserNotFound,
)
from whispr.services.user.service.profiles import checked_display_name, checked_locale, checked_time_zone


@pytest.mark.parametrize(
    ("given_name", "kept"),
    [
        ("  Ada  ", "Ada"),
        ("Zoë", "Zoë"),
        ("Zoe\u0308", "Zoë"),
        ("王小明", "王小明"),
        ("عائشة", "عائشة"),
        ("👩\u200d🚀 Sally", "👩\u200d🚀 Sally"),
        ("x" * 64, "x" * 64),
        (None, None),
    ],
)
def test_display_names_that_are_fine(given_name: str | None, kept: str | None) -> None:
    assert checked_display_name(given_name) == kept


@pytest.mark.parametrize(
    "name",
    [
        "",
        "   ",
        "x" * 65,
        "two\nlines",
        "nul\0",
        "\u202egnp.exe",
        "\u200d\u200d",
        "bell\a",
        "line\u2028sep",
        "\ud800",
    ],
)
def test_display_names_that_mislead_or_hide_are_refused(name: str) -> None:
    with pytest.raises(InvalidDisplayName):
        checked_display_name(name)


@given(st.text(max_size=80))
def test_a_kept_display_name_is_short_visible_and_stays_itself(name: str) -> None:
    try:
        kept = checked_display_name(name)
    except InvalidDisplayName:
        return
    assert kept is not None
    assert 1 <= len(kept) <= 64
    assert "\0" not in kept
    assert not any(unicodedata.category(letter) in {"Cc", "Cs"} for letter in kept)
    assert checked_display_name(kept) == kept


@pytest.mark.parametrize(
    ("tag", "kept"),
    [
        ("en", "en"),
        ("PT-br", "pt-BR"),
        ("zh-hant-tw", "zh-Hant-TW"),
        ("es-419", "es-419"),
        ("de-CH-1996", "de-CH-1996"),
        ("EN-u-CA-gregory", "en-u-ca-gregory"),
        ("sl-rozaj-biske", "sl-rozaj-biske"),
        (None, "en"),
    ],
)
def test_locales(tag: str | None, kept: str) -> None:
    assert checked_locale(tag) == kept


@pytest.mark.parametrize(
    "tag", ["", "e", "english please", "en_US", "en-", "-en", "en--US", "é", "en\n", "a" * 36, "en\0"]
)
def test_locales_that_are_none(tag: str) -> None:
    with pytest.raises(InvalidLocale):
        checked_locale(tag)


@given(st.from_regex(r"[a-zA-Z]{2,3}(-[a-zA-Z0-9]{1,8}){0,3}", fullmatch=True))
def test_a_kept_locale_stays_itself(tag: str) -> None:
    try:
        kept = checked_locale(tag)
    except InvalidLocale:
        return
    assert kept.lower() == tag.lower()
    assert checked_locale(kept) == kept


@pytest.mark.parametrize("zone", ["UTC", "Europe/Paris", "America/Argentina/Buenos_Aires", "Asia/Kolkata"])
def test_time_zones(zone: str) -> None:
    assert checked_time_zone(zone) == zone


@pytest.mark.parametrize(
    "zone",
    [
        "",
        "Mars/Olympus",
        "europe/paris",
        "../../etc/passwd",
        "/etc/localtime",
        "localtime",
        "UTC\0",
        "+02:00",
    ],
)
def test_time_zones_that_are_none(zone: str) -> None:
    with pytest.raises(InvalidTimeZone):
        checked_time_zone(zone)


async def test_changes_touch_only_what_they_name(world: World) -> None:
    user_id = await world.person()
    picture = uuid4()
    await world.service.profiles.update(
        user_id, {"display_name": "Ada", "avatar_media_id": picture, "privacy": {"online": "nobody"}}
    )
    world.clock.advance(5)
    profile = await world.service.profiles.update(
        user_id, {"time_zone": "Europe/Paris", "privacy": {"groups": "contacts"}}
    )
    assert (profile.display_name, profile.avatar_media_id, profile.time_zone) == (
        "Ada",
        picture,
        "Europe/Paris",
    )
    assert profile.privacy == Privacy(online="nobody", groups="contacts")
    assert profile.updated_at == world.clock.now()
    cleared = await world.service.profiles.update(
        user_id, {"display_name": None, "avatar_media_id": None, "time_zone": None}
    )
    assert (cleared.display_name, cleared.avatar_media_id, cleared.time_zone) == (None, None, "UTC")
    assert await world.service.profiles.own(user_id) == cleared


async def test_a_refused_change_changes_nothing(world: World) -> None:
    user_id = await world.person()
    before = await world.service.profiles.own(user_id)
    for changes in (
        {"display_name": "Ada", "locale": "not a locale"},
        {"display_name": "Ada", "time_zone": "Moon"},
    ):
        with pytest.raises(Failure):
            await world.service.profiles.update(user_id, changes)
    assert await world.service.profiles.own(user_id) == before


async def test_changes_tell_messaging(world: World) -> None:
    user_id = await world.person()
    assert await world.hints(lambda: world.service.profiles.update(user_id, {"display_name": "Ada"})) == [
        ("profile", user_id)
    ]
    assert ("relations", user_id) in await world.hints(
        lambda: world.service.profiles.update(user_id, {"privacy": {"messages": "contacts"}})
    )


async def test_an_erased_person_cannot_change_a_profile(world: World) -> None:
    user_id = await world.person()
    await world.service.erasure.erase(user_id)
    with pytest.raises(UserNotFound):
        await world.service.profiles.update(user_id, {"display_name": "Ghost"})


async def seen(world: World, viewer: UUID, owner: UUID) -> str | None:
    return (await world.service.profiles.view(viewer, owner)).display_name


@pytest.mark.parametrize(
    ("audience", "stranger_sees", "contact_sees"),
    [("everyone", True, True), ("contacts", False, True), ("nobody", False, False)],
)
async def test_privacy_of_the_profile(
    world: World, audience: str, stranger_sees: bool, contact_sees: bool
) -> None:
    owner, stranger, contact = [await world.person() for _ in range(3)]
    await world.service.profiles.update(
        owner, {"display_name": "Ada", "avatar_media_id": uuid4(), "privacy": {"profile": audience}}
    )
    await world.service.relations.add_contact(owner, contact)
    # Adding somebody gives no right to see them: only who was added counts.
    await world.service.relations.add_contact(stranger, owner)
    assert await seen(world, stranger, owner) == ("Ada" if stranger_sees else None)
    assert await seen(world, contact, owner) == ("Ada" if contact_sees else None)
    assert await seen(world, owner, owner) == "Ada"


async def test_who_is_blocked_sees_a_person_who_shows_nothing(world: World) -> None:
    owner, blocked, discreet = [await world.person() for _ in range(3)]
    for person, privacy in ((owner, {}), (discreet, {"profile": "nobody"})):
        await world.service.profiles.update(
            person, {"display_name": "Ada", "avatar_media_id": uuid4(), "privacy": privacy}
        )
    await world.service.relations.block(owner, blocked)

    def without_names(profile: Any) -> tuple[Any, ...]:
        return (profile.display_name, profile.avatar_media_id, profile.is_contact, profile.is_blocked)

    of_owner = await world.service.profiles.view(blocked, owner)
    of_discreet = await world.service.profiles.view(blocked, discreet)
    assert without_names(of_owner) == without_names(of_discreet) == (None, None, False, False)
    found = await world.service.profiles.search(blocked, world.username(owner))
    assert [without_names(profile) for profile in found] == [(None, None, False, False)]
    # Whoever blocks still sees whom.
    await world.service.profiles.update(blocked, {"display_name": "Bob"})
    mine = await world.service.profiles.view(owner, blocked)
    assert (mine.display_name, mine.is_blocked) == ("Bob", True)


async def test_searching_and_viewing_are_limited(world: World) -> None:
    service = world.make(limited=True, searches_per_minute=3, views_per_minute=4)
    viewer, other = await world.person(), await world.person()
    for _ in range(3):
        await service.profiles.search(viewer, world.username(other))
    with pytest.raises(RateLimited) as refusal:
        await service.profiles.search(viewer, world.username(other))
    assert refusal.value.retry_after
    assert await service.profiles.search(other, world.username(viewer)), "each person has their own limit"
    for _ in range(4):
        await service.profiles.view(viewer, other)
    with pytest.raises(RateLimited):
        await service.profiles.view(viewer, other)
    with pytest.raises(RateLimited):
        await service.relations.add_contact(viewer, other)


def test_stored_privacy_of_a_newer_version_is_read_as_far_as_known() -> None:
    assert Privacy.from_stored({"online": "nobody", "telepathy": "contacts"}) == Privacy(online="nobody")
