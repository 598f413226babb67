"""Who keeps their reading private, as `user` says, remembered for a minute."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Protocol
from uuid import UUID

import msgspec

from whispr.kit.batching import Batcher
from whispr.kit.cache import Cache
from whispr.kit.clock import Clock
from whispr.kit.errors import Failure
from whispr.kit.telemetry import get_logger
from whispr.services.messaging.models import MemberView
from whispr.services.messaging.service.directory import HINTS

log = get_logger(__name__)


class Profile(Protocol):
    """The part of a profile this needs."""

    @property
    def user_id(self) -> UUID:
        """Whose it is."""

    @property
    def read_receipts(self) -> bool:
        """Whether others are told what the person has read."""


class Profiles(Protocol):
    """The part of `user` this needs."""

    async def get_profiles(self, user_ids: Sequence[UUID]) -> Sequence[Profile]:
        """The profiles of people; unknown ids are left out."""


class _Hint(msgspec.Struct):
    kind: str
    user_id: UUID | None = None


class ReadReceipts:
    """Answers who is not to be shown as having read anything."""

    TTL = 60.0
    MAX_PEOPLE = 200_000

    def __init__(self, profiles: Profiles, cache: Cache, clock: Clock) -> None:
        self._profiles = Batcher(self._fetch)
        self._source = profiles
        self._cache = cache
        self._clock = clock
        self._shown: OrderedDict[UUID, tuple[bool, float]] = OrderedDict()

    def start(self) -> None:
        """Listen for changed profiles."""
        self._cache.subscribe(HINTS, self._on_hint)
        self._cache.on_reconnect(self._shown.clear)

    async def hidden(self, user_ids: Collection[UUID]) -> frozenset[UUID]:
        """Those of the people whose reading nobody else may see. While `user` cannot say, nobody's may be seen."""
        now = self._clock.time()
        missing = [user_id for user_id in user_ids if self._shown.get(user_id, (True, 0.0))[1] <= now]
        if missing:
            try:
                await self._ask(missing, now)
            except Failure as failure:
                log.warning("read_receipts_unknown", code=failure.code, people=len(missing))
        shown = {user_id for user_id in user_ids if self._is_shown(user_id, now)}
        return frozenset(user_ids) - shown

    async def mask(self, members: Sequence[MemberView], viewer_id: UUID) -> list[MemberView]:
        """The members as `viewer_id` may see them: `read_seq` is None for those who hide it."""
        return without_reading(
            members, await self.hidden({member.user_id for member in members} - {viewer_id})
        )

    def _is_shown(self, user_id: UUID, now: float) -> bool:
        shown, until = self._shown.get(user_id, (False, 0.0))
        return shown and until > now

    async def _ask(self, user_ids: list[UUID], now: float) -> None:
        for user_id, shown in (await self._profiles.ask(user_ids)).items():
            self._shown[user_id] = (shown, now + self.TTL)
            self._shown.move_to_end(user_id)
        while len(self._shown) > self.MAX_PEOPLE:
            self._shown.popitem(last=False)

    async def _fetch(self, asked: list[list[UUID]]) -> list[dict[UUID, bool]]:
        wanted = list(dict.fromkeys(user_id for user_ids in asked for user_id in user_ids))
        shown = {
            profile.user_id: profile.read_receipts for profile in await self._source.get_profiles(wanted)
        }
        return [{user_id: shown[user_id] for user_id in user_ids if user_id in shown} for user_ids in asked]

    def _on_hint(self, data: bytes) -> None:
        try:
            hint = msgspec.json.decode(data, type=_Hint)
        except msgspec.MsgspecError:
            return
        if hint.kind == "profile" and hint.user_id is not None:
            self._shown.pop(hint.user_id, None)


def without_reading(members: Sequence[MemberView], hidden: Collection[UUID]) -> list[MemberView]:
    """The members, with `read_seq` None for those in `hidden`."""
    return [
        msgspec.structs.replace(member, read_seq=None) if member.user_id in hidden else member
        for member in members
    ]
