"""Who keeps their reading private, remembered and forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID, uuid4

import msgspec

from whispr.kit.cache import Cache
from whispr.kit.clock import ManualClock
from whispr.kit.errors import Unavailable
from whispr.services.messaging.models import MemberView, Role
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


@dataclass
class Apart:
    """Who has blocked whom."""

    people: frozenset[UUID] = frozenset()
    away: bool = False

    async def blocked(self, user_id: UUID, others: Collection[UUID]) -> frozenset[UUID]:
        if self.away:
            raise Unavailable
        return self.people & frozenset(others)


async def test_answers_are_remembered_for_a_minute(messaging_cache: Cache) -> None:
    ann, bob = uuid4(), uuid4()
    profiles = Profiles({ann: True, bob: False})
    clock = ManualClock()
    read_receipts = ReadReceipts(profiles, Apart(), messaging_cache, clock)
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
    read_receipts = ReadReceipts(profiles, Apart(), messaging_cache, ManualClock())
    assert await read_receipts.hidden([ann]) == {ann}
    profiles.away = False
    assert await read_receipts.hidden([ann, gone]) == {gone}


async def test_a_changed_profile_is_asked_for_again(messaging_cache: Cache) -> None:
    ann = uuid4()
    profiles = Profiles({ann: True})
    read_receipts = ReadReceipts(profiles, Apart(), messaging_cache, ManualClock())
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


def view(user_id: UUID) -> MemberView:
    return MemberView(user_id, Role.MEMBER, datetime.now(UTC), 5, 4)


async def test_people_who_are_kept_apart_see_no_watermarks(messaging_cache: Cache) -> None:
    ann, bob, cid = uuid4(), uuid4(), uuid4()
    relations = Apart(frozenset({ann, bob}))
    profiles = Profiles(dict.fromkeys((ann, bob, cid), True))
    read_receipts = ReadReceipts(profiles, relations, messaging_cache, ManualClock())
    shown = await read_receipts.mask([view(ann), view(bob), view(cid)], ann)
    assert [(item.delivered_seq, item.read_seq) for item in shown] == [(5, 4), (0, None), (5, 4)]
    pair = await read_receipts.mask_for_join([view(ann), view(bob)], ann)
    assert [(item.delivered_seq, item.read_seq) for item in pair] == [(5, 4), (0, None)]
    relations.away = True
    shown = await read_receipts.mask([view(ann), view(bob), view(cid)], ann)
    assert [(item.delivered_seq, item.read_seq) for item in shown] == [(5, 4), (0, None), (0, None)]
