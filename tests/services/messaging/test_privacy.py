"""Who keeps their reading private, remembered and forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import msgspec

from whispr.kit.cache import Cache
from whispr.kit.clock import ManualClock
from whispr.kit.errors import Unavailable
from whispr.services.messaging.service.directory import HINTS
from whispr.services.messaging.service.privacy import ReadReceipts


@dataclass(frozen=True)
class Profile:
    user_id: UUID
    read_receipts: bool


@dataclass
class Profiles:
    """What `user` would say."""

    shown: dict[UUID, bool] = field(default_factory=dict)
    away: bool = False
    asked: list[UUID] = field(default_factory=list)

    async def get_profiles(self, user_ids: Sequence[UUID]) -> list[Profile]:
        if self.away:
            raise Unavailable
        self.asked += user_ids
        return [Profile(user, self.shown[user]) for user in user_ids if user in self.shown]


async def test_answers_are_remembered_for_a_minute(messaging_cache: Cache) -> None:
    ann, bob = uuid4(), uuid4()
    profiles = Profiles({ann: True, bob: False})
    clock = ManualClock()
    read_receipts = ReadReceipts(profiles, messaging_cache, clock)
    assert await read_receipts.hidden([ann, bob]) == {bob}
    profiles.shown = {ann: False, bob: True}
    clock.advance(59)
    assert await read_receipts.hidden([ann, bob]) == {bob}
    assert profiles.asked == [ann, bob]
    clock.advance(1)
    assert await read_receipts.hidden([ann, bob]) == {ann}


async def test_nobody_is_shown_while_user_cannot_say(messaging_cache: Cache) -> None:
    ann, gone = uuid4(), uuid4()
    profiles = Profiles({ann: True}, away=True)
    read_receipts = ReadReceipts(profiles, messaging_cache, ManualClock())
    assert await read_receipts.hidden([ann]) == {ann}
    profiles.away = False
    assert await read_receipts.hidden([ann, gone]) == {gone}


async def test_a_changed_profile_is_asked_for_again(messaging_cache: Cache) -> None:
    ann = uuid4()
    profiles = Profiles({ann: True})
    read_receipts = ReadReceipts(profiles, messaging_cache, ManualClock())
    read_receipts.start()
    while HINTS not in messaging_cache.subscribed:
        await asyncio.sleep(0.01)
    assert await read_receipts.hidden([ann]) == frozenset()
    profiles.shown[ann] = False
    await messaging_cache.publish(HINTS, b"not json")
    await messaging_cache.publish(HINTS, msgspec.json.encode({"kind": "profile", "user_id": ann}))
    async with asyncio.timeout(5):
        while not await read_receipts.hidden([ann]):
            await asyncio.sleep(0.01)
