"""What members see of each other's reading: who keeps it private, and who is kept apart from whom, as `user` says."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Final, Protocol
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

_PAIR: Final = 2


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


class Relations(Protocol):
    """Who knows whom people have blocked."""

    async def blocked(self, user_id: UUID, others: Collection[UUID]) -> frozenset[UUID]:
        """Those of `others` who are kept apart from `user_id`."""


class _Hint(msgspec.Struct):
    kind: str
    user_id: UUID | None = None


class ReadReceipts:
    """Answers who is not to be shown as having read anything. What `user` says is remembered for a minute."""

    TTL = 60.0
    MAX_PEOPLE = 200_000

    def __init__(self, profiles: Profiles, relations: Relations, cache: Cache, clock: Clock) -> None:
        self._profiles = Batcher(self._fetch)
        self._source = profiles
        self._relations = relations
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

    async def apart(self, viewer_id: UUID, others: Collection[UUID]) -> frozenset[UUID]:
        """Those of whom `viewer_id` hears nothing, one having blocked the other. While `user` cannot say, everybody."""
        try:
            return await self._relations.blocked(viewer_id, others)
        except Failure as failure:
            log.warning("relations_unknown", code=failure.code, people=len(others))
            return frozenset(others)

    async def mask(self, members: Sequence[MemberView], viewer_id: UUID) -> list[MemberView]:
        """The members as `viewer_id` may see them.

        `read_seq` is None for those who hide it. Of those who are kept apart from the viewer there is no `delivered_seq`
        either: it is 0.
        """
        others = {member.user_id for member in members} - {viewer_id}
        hidden = await self.hidden(others)
        return without_marks(without_reading(members, hidden), await self.apart(viewer_id, others))

    async def mask_for_join(self, members: Sequence[MemberView], viewer_id: UUID) -> list[MemberView]:
        """As `mask`, but in a group without asking who is kept apart.

        Everybody who opens a group would ask about every pair in it; there, a look by REST leaves out more than a join.
        """
        if len(members) <= _PAIR:
            return await self.mask(members, viewer_id)
        hidden = await self.hidden({member.user_id for member in members} - {viewer_id})
        return without_reading(members, hidden)

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


def without_marks(members: Sequence[MemberView], apart: Collection[UUID]) -> list[MemberView]:
    """The members, with no watermarks of those in `apart`."""
    return [
        msgspec.structs.replace(member, delivered_seq=0, read_seq=None) if member.user_id in apart else member
        for member in members
    ]
