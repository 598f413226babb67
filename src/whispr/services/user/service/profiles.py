"""Profiles: what people say of themselves, and what others are shown of it."""

from __future__ import annotations

import re
import unicodedata
import zoneinfo
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from typing import Any
from uuid import UUID

from whispr.kit.cache import RateLimiter
from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.services.user import store
from whispr.services.user.models import (
    InvalidDisplayName,
    InvalidLocale,
    InvalidTimeZone,
    Profile,
    PublicProfile,
    RelatedProfile,
    UserNotFound,
)
from whispr.services.user.service.directory import Directory, check_batch
from whispr.services.user.service.hints import Hints
from whispr.services.user.settings import UserSettings

DISPLAY_NAME_LENGTH = 64

# Presence is not activity: an hour's grain serves cleanup and reports and spares a write per request.
ACTIVITY_GRAIN = timedelta(hours=1)

# RFC 5646 section 2.1 without the grandfathered tags, which it asks nobody to make.
_LOCALE = re.compile(
    r"[a-z]{2,3}(?:-[a-z]{3}){0,3}"
    r"(?:-[a-z]{4})?(?:-(?:[a-z]{2}|[0-9]{3}))?(?:-(?:[a-z0-9]{5,8}|[0-9][a-z0-9]{3}))*"
    r"(?:-[a-wyz0-9](?:-[a-z0-9]{2,8})+)*(?:-x(?:-[a-z0-9]{1,8})+)?",
    re.IGNORECASE | re.ASCII,
)
_LOCALE_LENGTH = 35

# Letters that turn the direction of the text around a name would let a name rewrite its surroundings.
_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Profiles:
    """Reading and changing profiles."""

    def __init__(
        self,
        database: Database,
        directory: Directory,
        hints: Hints,
        limiter: RateLimiter,
        clock: Clock,
        settings: UserSettings,
    ) -> None:
        self._database = database
        self._directory = directory
        self._hints = hints
        self._limiter = limiter
        self._clock = clock
        self._settings = settings

    async def own(self, user_id: UUID) -> Profile:
        """The caller's own profile. Raises UserNotFound after the account was erased."""
        await self._directory.ensure([user_id])
        now = self._clock.now()
        async with self._database.connection() as conn:
            await store.touch(conn, [user_id], now, now - ACTIVITY_GRAIN)
            profile = await store.profile(conn, user_id)
        if profile is None:
            raise UserNotFound
        return profile

    async def update(self, user_id: UUID, changes: Mapping[str, Any]) -> Profile:
        """Change the caller's own profile; what `changes` does not name stays.

        Keys: `display_name` (str | None), `avatar_media_id` (UUID | None), `locale` and `time_zone` (str | None for
        the default), `privacy` (some or all of the fields of `Privacy`).
        """
        privacy: Mapping[str, Any] = changes.get("privacy") or {}
        values = {name: _CHECKS[name](value) for name, value in changes.items() if name in _CHECKS}
        await self._directory.ensure([user_id])
        async with self._database.connection() as conn:
            profile = await store.update_profile(conn, user_id, values, privacy, self._clock.now())
        if profile is None:
            raise UserNotFound
        await self._hints.changed("profile", user_id)
        if privacy:
            await self._hints.changed("relations", user_id)
        return profile

    async def view(self, viewer_id: UUID, user_id: UUID) -> PublicProfile:
        """What the viewer is shown of a person. Raises UserNotFound, RateLimited."""
        await self._limiter.check("user-view", str(viewer_id), self._settings.views_per_minute, 60)
        await self._directory.ensure([user_id])
        async with self._database.connection() as conn:
            (found,) = await store.related_pairs(conn, [(viewer_id, user_id)])
        if found is None:
            raise UserNotFound
        return shown(found, viewer_id)

    async def search(self, viewer_id: UUID, username: str) -> list[PublicProfile]:
        """The person of exactly that name, or nobody. Raises InvalidUsername, RateLimited."""
        await self._limiter.check("user-search", str(viewer_id), self._settings.searches_per_minute, 60)
        user_id = await self._directory.find(username)
        if user_id is None:
            return []
        async with self._database.connection() as conn:
            (found,) = await store.related_pairs(conn, [(viewer_id, user_id)])
        return [] if found is None else [shown(found, viewer_id)]

    async def batch(self, user_ids: Sequence[UUID]) -> list[Profile]:
        """The profiles of at most 1,000 people for a neighbouring service; unknown ids are left out."""
        check_batch(len(user_ids))
        found = await self._stored(user_ids)
        missing = set(user_ids) - {profile.user_id for profile in found}
        if missing:
            await self._directory.ensure(sorted(missing))
            found = await self._stored(user_ids)
        return found

    async def _stored(self, user_ids: Sequence[UUID]) -> list[Profile]:
        async with self._database.connection() as conn:
            return await store.profiles(conn, user_ids)


def shown(found: RelatedProfile, viewer_id: UUID) -> PublicProfile:
    """Apply the owner's privacy.

    Whoever is blocked sees what a stranger sees of a person who shows nothing: the answer must not tell them.
    """
    profile = found.profile
    visible = profile.user_id == viewer_id or (
        not found.blocks_viewer and admits(profile.privacy.profile, found)
    )
    return PublicProfile(
        user_id=profile.user_id,
        username=profile.username,
        display_name=profile.display_name if visible else None,
        avatar_media_id=profile.avatar_media_id if visible else None,
        is_contact=found.is_contact,
        is_blocked=found.is_blocked,
    )


def admits(audience: str, found: RelatedProfile) -> bool:
    """Whether the viewer belongs to the audience the owner chose."""
    return audience == "everyone" or (audience == "contacts" and found.knows_viewer)


def checked_display_name(value: str | None) -> str | None:
    if value is None:
        return None
    name = unicodedata.normalize("NFC", value).strip()
    if not 1 <= len(name) <= DISPLAY_NAME_LENGTH or any(map(_is_unfit_for_a_name, name)):
        raise InvalidDisplayName(field="display_name")
    if all(unicodedata.category(letter) in {"Cf", "Zs", "Mn", "Me"} for letter in name):
        raise InvalidDisplayName(field="display_name")
    return name


def _is_unfit_for_a_name(letter: str) -> bool:
    return letter in _BIDI_CONTROLS or unicodedata.category(letter) in {"Cc", "Cs", "Cn", "Zl", "Zp"}


def checked_locale(value: str | None) -> str:
    """The tag in its usual case ("zh-hant-tw" becomes "zh-Hant-TW"); None is the default."""
    if value is None:
        return "en"
    if len(value) > _LOCALE_LENGTH or not _LOCALE.fullmatch(value):
        raise InvalidLocale(field="locale")
    language, *rest = value.lower().split("-")
    parts = [language]
    for number, part in enumerate(rest):
        if any(len(earlier) == 1 for earlier in rest[:number]):
            parts.append(part)
        elif len(part) == 2:
            parts.append(part.upper())
        elif len(part) == 4 and part.isalpha():
            parts.append(part.title())
        else:
            parts.append(part)
    return "-".join(parts)


def checked_time_zone(value: str | None) -> str:
    """A name of the IANA database; None is the default."""
    if value is None:
        return "UTC"
    if value not in _time_zones():
        raise InvalidTimeZone(field="time_zone")
    return value


@cache
def _time_zones() -> frozenset[str]:
    # "localtime" and "Factory" mean something else, or nothing, on every machine.
    return frozenset(zoneinfo.available_timezones() - {"localtime", "Factory"})


def _checked_media_id(value: UUID | None) -> UUID | None:
    return value


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "display_name": checked_display_name,
    "avatar_media_id": _checked_media_id,
    "locale": checked_locale,
    "time_zone": checked_time_zone,
}
