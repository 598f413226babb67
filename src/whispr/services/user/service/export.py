"""Everything the user service keeps of one person."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec

from whispr.kit.cache import RateLimiter
from whispr.kit.clock import Clock
from whispr.services.user.models import Position, Profile, Quotas, Relation
from whispr.services.user.service.profiles import Profiles
from whispr.services.user.service.relations import Relations
from whispr.services.user.service.storage import Storage

EXPORTS_PER_DAY = 5
_PAGE = 500


class PersonalData(msgspec.Struct, frozen=True):
    """A person's profile, the people on their lists, and their limits. The lists hold at most some thousand each."""

    profile: Profile
    contacts: list[Relation]
    blocks: list[Relation]
    quotas: Quotas
    exported_at: datetime


class Export:
    """Reads what `Profiles`, `Relations` and `Storage` would show the person, all at once."""

    def __init__(
        self, profiles: Profiles, relations: Relations, storage: Storage, limiter: RateLimiter, clock: Clock
    ) -> None:
        self._profiles = profiles
        self._relations = relations
        self._storage = storage
        self._limiter = limiter
        self._clock = clock

    async def of(self, user_id: UUID) -> PersonalData:
        """The person's own data. Raises UserNotFound, RateLimited."""
        await self._limiter.check("user-export", str(user_id), EXPORTS_PER_DAY, 24 * 3600)
        return PersonalData(
            profile=await self._profiles.own(user_id),
            contacts=await self._all(user_id, blocked=False),
            blocks=await self._all(user_id, blocked=True),
            quotas=await self._storage.quotas(user_id),
            exported_at=self._clock.now(),
        )

    async def _all(self, user_id: UUID, *, blocked: bool) -> list[Relation]:
        read = self._relations.blocks if blocked else self._relations.contacts
        found: list[Relation] = []
        after: Position | None = None
        while True:
            page = await read(user_id, after, _PAGE)
            found += page.items
            if page.next is None:
                return found
            after = page.next
